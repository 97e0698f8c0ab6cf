"""Flags that several verbs share, and the checks that several verbs make of what they were given.

Invariant: a check costs nothing and comes before any work, so that a wrong flag never ends an hour's computation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import msgspec
import typer

from edgepose.errors import UsageError

if TYPE_CHECKING:
    from edgepose.data.coco import PoseDataset
    from edgepose.spec import Aim, Backend, Execution, Precision

BackendFlag = Annotated[
    str | None, typer.Option("--backend", help="Take only engines of this runtime: onnxruntime, openvino.")
]
PrecisionFlag = Annotated[str | None, typer.Option("--precision", help="Take only engines of this precision.")]
ThreadsFlag = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=0,
        help="Threads of one inference, 0 for all physical cores. Default: the engine's; measured where engines are.",
    ),
]
AimFlag = Annotated[
    str | None,
    typer.Option(
        "--aim",
        help="What the engine is chosen for, by measuring once on this machine: latency, throughput, memory, energy; "
        "none takes the bundle's first. Default: $EDGEPOSE_AIM, else latency.",
    ),
]
ProviderFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--provider",
        help="Take only engines of ONNX Runtime and run them by this execution provider: cpu, cuda, tensorrt, "
        "openvino, coreml, directml, xnnpack; repeat for several, the preferred one first.",
    ),
]
DeviceFlag = Annotated[
    str | None,
    typer.Option("--device", help="Take only engines of OpenVINO and run them on this device: CPU, GPU, NPU, AUTO."),
]
StrictFlag = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Fail where a node of the network runs on none of the --provider named, or the engine cannot answer, "
        "instead of running it elsewhere.",
    ),
]
FlipTestFlag = Annotated[
    bool,
    typer.Option("--flip-test", help="Show each crop mirrored as well and average the answers: twice the work."),
]
DataFlag = Annotated[Path | None, typer.Option("--data", help="Folder with SPLIT.json and images/.")]
SplitFlag = Annotated[str, typer.Option("--split", help="Which annotation file of --data: SPLIT.json.")]
AnnotationsFlag = Annotated[
    Path | None, typer.Option("--annotations", help="COCO keypoint JSON, instead of --data; needs --images.")
]
ImagesFlag = Annotated[Path | None, typer.Option("--images", help="Folder of the photographs of --annotations.")]
JsonFlag = Annotated[Path | None, typer.Option("--json", help="Write the result as JSON to this file (- for stdout).")]
StdoutJsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
SeedFlag = Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")]


def checked_backend(name: str | None) -> Backend | None:
    """The backend called `name`.

    Raises:
        UsageError: There is none of that name.
    """
    from edgepose.runtime import BACKENDS

    if name is not None and name not in BACKENDS:
        raise UsageError("--backend", found=repr(name), expected=f"one of {', '.join(BACKENDS)}")
    return name


def checked_execution(
    backend: Backend | None, providers: Sequence[str] | None, device: str | None, *, strict: bool
) -> tuple[Backend | None, Execution | None]:
    """The runtime that --backend, --provider and --device mean, and what it is told; None for what nobody said.

    Raises:
        UsageError: There is no such provider or device, or they contradict each other.
    """
    from edgepose.spec import Execution

    if strict and not providers:
        fix = "say which provider all nodes have to run on, or leave it off"
        raise UsageError("--strict", found="no --provider", expected="at least one", fix=fix)
    if providers and device is not None:
        found, expected = "--provider as well", "one of them: providers are ONNX Runtime's, devices OpenVINO's"
        raise UsageError("--device", found=found, expected=expected, fix="leave one of them off")
    if not providers and device is None:
        return backend, None
    wanted: Backend = "onnxruntime" if providers else "openvino"
    flag = "--provider" if providers else "--device"
    if backend not in (None, wanted):
        raise UsageError(flag, found=f"--backend {backend}", expected=wanted, fix="leave one of them off")
    told = {"providers": [p.lower() for p in providers], "strict": strict} if providers else {"device": device}
    try:
        return wanted, msgspec.convert({wanted: told}, Execution)
    except msgspec.ValidationError as err:
        known = "cpu, cuda, tensorrt, openvino, coreml, directml, xnnpack" if providers else "CPU, GPU, NPU or AUTO"
        found = ", ".join(providers) if providers else str(device)
        raise UsageError(flag, found=found, expected=known, fix="choose one of these") from err


def checked_precision(name: str | None) -> Precision | None:
    """The precision called `name`.

    Raises:
        UsageError: There is none of that name.
    """
    known = ("fp32", "bf16", "fp16", "int8")
    if name is not None and name not in known:
        raise UsageError("--precision", found=repr(name), expected=f"one of {', '.join(known)}")
    return cast("Precision | None", name)


def checked_aim(name: str | None) -> Aim | Literal["none"] | None:
    """The aim called `name`, or that of the environment; None where neither says anything.

    Raises:
        UsageError: There is none of that name.
    """
    from edgepose.spec import AIMS

    where, said = ("--aim", name) if name else ("$EDGEPOSE_AIM", os.environ.get("EDGEPOSE_AIM"))
    if said and said not in (*AIMS, "none"):
        raise UsageError(where, found=repr(said), expected=f"{', '.join(AIMS)} or none")
    return cast("Aim | Literal['none']", said) if said else None


def flag_fault(
    verb: str, err: msgspec.ValidationError, flags: Mapping[str, tuple[str, object]], fix: str
) -> UsageError:
    """What msgspec says of a struct that was made of flags, said of the flag at fault.

    Args:
        verb: Whose flags they are.
        err: What it says.
        flags: Flag and what was given, by the field of the struct that it became.
        fix: What to do where no single flag is at fault.
    """
    said, _, place = str(err).partition(" - at `$.")
    flag, given = flags.get(place.rstrip("`").partition("[")[0], ("", None))
    if not flag:
        return UsageError(verb, found=said, fix=fix)
    wanted = said.removeprefix("Expected ") if said.startswith("Expected ") else ""
    several = [f"{name}={value}" for name, value in given.items()] if isinstance(given, dict) else given
    found = ", ".join(map(str, several)) if isinstance(several, list) else str(several)
    return UsageError(flag, found=found, expected=wanted or "one of its choices", fix=f"see {verb} --help")


def labelled_people(data: Path | None, split: str, annotations: Path | None, images: Path | None) -> PoseDataset:
    """The data set that --data and --split, or --annotations and --images, name.

    Raises:
        UsageError: Neither pair, or both.
        DataUnavailable: It is not there.
        AnnotationError: It breaks the format.
    """
    from edgepose.data.coco import dataset, read_coco

    given = [name for name, value in (("--data", data), ("--annotations", annotations), ("--images", images)) if value]
    if data is not None and len(given) == 1:
        return dataset(data, split)
    if data is None and annotations is not None and images is not None:
        return read_coco(annotations, images)
    expected = "--data DIR, or --annotations FILE and --images DIR"
    raise UsageError("labelled photographs", found=" and ".join(given) or "neither", expected=expected)


def check_outputs(outputs: Sequence[Path | None], inputs: Sequence[Path]) -> None:
    """Refuses to write over what is read, into a bundle, or twice to one file.

    Args:
        outputs: Files or folders that will be written; None and "-" are passed over.
        inputs: Files, folders and bundles that will be read.

    Raises:
        UsageError: Names the output at fault.
    """
    seen: set[Path] = set()
    for output in outputs:
        if output is None or output == Path("-"):
            continue
        resolved = output.resolve()
        if resolved in seen:
            raise UsageError(f"writing {output}", found="the same name given twice", expected="different files")
        seen.add(resolved)
        for source in (path.resolve() for path in inputs):
            if resolved == source:
                raise UsageError(
                    f"writing {output}", found="the input itself", expected="another name", fix="choose another name"
                )
            if resolved.is_relative_to(source) and (source / "manifest.json").is_file():
                fix = "a bundle never changes: choose a place outside it"
                raise UsageError(f"writing {output}", found=f"a place inside the bundle {source.name}", fix=fix)
