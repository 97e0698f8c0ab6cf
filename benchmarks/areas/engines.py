"""Engines: what builds where, how near it stays to the network, what of it runs in integers, how long building takes.

Invariant: a figure is the worst of all networks and engines that it is about, never a mean; what could not be built
here is a row that says why, and no figure.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.claim import Claim, Measured
from benchmarks.context import Context
from benchmarks.subjects import compiled, empty_cache, val_people
from edgepose.blocks.zoo import find_checkpoint, zoo_names
from edgepose.bundle import Bundle
from edgepose.errors import EdgeposeError, EnvironmentFault, MissingDependency
from edgepose.profiles import load_target
from edgepose.recipe import Export
from edgepose.runtime import EXECUTABLE
from edgepose.spec import Backend
from edgepose.stages.cache import StageResult

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0")
PARITY_NETWORKS = ("kpe-t", "kpe-s", "orn-s")
INT8_BUNDLES = (("kpe-t", "ptq-int8"), ("kpe-s", "ptq-int8"), ("orn-s", "ptq-int8"), ("kpe-s", "prune-qat-int8"))
PEOPLE = 256
_FP16_SHARE = 5.0  # the bar is 0.1 px in FP32 and 0.5 px in FP16


# ------------------------------------------------------------------------------------------------------------- builds


def rtx_models(context: Context) -> Measured:
    """Share of the zoo's networks that TensorRT-RTX compiles ahead of time for at least four compute capabilities."""
    if find_spec("tensorrt_rtx") is None:
        raise MissingDependency("tensorrt-rtx-cu13", extra="tensorrt-rtx", needed_for="compiling for RTX cards")
    found = {name: _rtx_capabilities(context, name) for name in zoo_names()}
    enough = sum(len(row["compiled"]) >= 4 for row in found.values())
    text = "; ".join(
        f"{name}: {', '.join(row['compiled']) or 'none'} {row['precision']}" for name, row in found.items()
    )
    return Measured(enough / len(found), text, {"networks": found, "asked": CAPABILITIES})


def _rtx_capabilities(context: Context, name: str) -> dict[str, Any]:
    from edgepose.export.half import half_onnx
    from edgepose.export.signed import signed_onnx
    from edgepose.export.tensorrt import PlanOrder, build_plan
    from edgepose.export.trt_lint import check_for_tensorrt
    from edgepose.export.weight_bits import quantisation_of

    exported = _exported(context, name, Export())
    model = exported / "model.onnx" if (exported / "model.onnx").exists() else exported / "float.onnx"
    spelt, dialect = context.folder / f"{name}-rtx.onnx", quantisation_of(model).dialect
    if dialect == "u8s8":
        signed_onnx(model, spelt)
    else:
        half_onnx(model, spelt)
    check_for_tensorrt(spelt)
    done, faults = [], {}
    for number, capability in enumerate(CAPABILITIES):
        context.told(f"compiling {name} for RTX", number, len(CAPABILITIES))
        target = msgspec.structs.replace(load_target("rtx-40"), name=f"sm{capability}", compute_capability=capability)
        try:
            build_plan(PlanOrder(spelt, target, "tensorrt-rtx"))
            done.append(capability)
        except EdgeposeError as err:
            faults[capability] = str(err)
    return {"compiled": done, "faults": faults, "precision": "fp16" if dialect == "float" else "int8"}


def build_seconds(context: Context) -> Measured:
    """Seconds to build kpe-s for every target that needs no other machine, into an empty cache."""
    seconds, _, targets, engines = _builds(context)
    text = f"{engines} engines for {', '.join(targets)} in {seconds:.1f} s, golden checks and timing included"
    return Measured(seconds, text, {"targets": targets, "engines": engines})


def rebuild_seconds(context: Context) -> Measured:
    """Seconds to build the same again where nothing has changed."""
    _, seconds, targets, engines = _builds(context)
    return Measured(
        seconds, f"{engines} engines for {', '.join(targets)} found in {seconds:.2f} s", {"targets": targets}
    )


def _builds(context: Context) -> tuple[float, float, list[str], int]:
    def work() -> tuple[float, float, list[str], int]:
        from edgepose.rebuild import BuildRequest, build_bundle

        source, targets = compiled(context, "kpe-s", "ptq-int8"), local_targets()
        out, times = context.folder / "built.bundle", []
        with empty_cache(context.folder / "build-cache"):
            for attempt in range(2):
                context.told("building kpe-s for all local targets", attempt, 2)
                started_s = time.perf_counter()
                result = build_bundle(BuildRequest(source.root, targets, out), _Nobody())
                times.append(time.perf_counter() - started_s)
        return times[0], times[1], targets, len(result.bundle.manifest.engines)

    return context.once("built for all local targets", work)


def local_targets() -> list[str]:
    """The INT8 targets that come with edgepose and whose engines are built and run on any CPU."""
    from edgepose.profiles import profile_names

    targets = [load_target(name) for name in profile_names("targets")]
    return [t.name for t in targets if set(t.backends) <= set(EXECUTABLE) and _on_cpu(t) and "int8" in t.precisions]


def _on_cpu(target: Any) -> bool:
    return not target.compute_capability and target.execution.openvino.device == "CPU"


# ------------------------------------------------------------------------------------------------------------- parity


def parity(context: Context) -> Measured:
    """Worst 99th percentile of keypoint shifts from torch's, pixels of the input; FP16 counts a fifth."""
    rows = _all_shifts(context, Export())
    worst = max(px / (_FP16_SHARE if form == "fp16" else 1.0) for row in rows.values() for form, px in row.items())
    return Measured(worst, _in_words(rows), {"p99_px": rows})


def fused_ends(context: Context) -> Measured:
    """Worst 99th percentile of keypoint shifts where normalising and decoding are part of the graph, pixels."""
    rows = _all_shifts(context, Export(image_input=True, decoding=True))
    return Measured(max(px for row in rows.values() for px in row.values()), _in_words(rows), {"p99_px": rows})


def _all_shifts(context: Context, ends: Export) -> dict[str, dict[str, float]]:
    """By network and form: the 99th percentile of how far keypoints are from torch's, pixels of the input."""
    rows = {}
    for number, name in enumerate(PARITY_NETWORKS):
        context.told("keypoints of torch and of engines", number, len(PARITY_NETWORKS))
        rows[name] = _shifts(context, name, ends)
    return rows


def _shifts(context: Context, name: str, ends: Export) -> dict[str, float]:
    from edgepose.export.half import half_onnx
    from edgepose.export.openvino import openvino_from_onnx
    from edgepose.stages.export import ENDED, FLOAT_ONNX
    from edgepose.stages.side_by_side import Form, side_by_side
    from edgepose.stages.source import Source

    exported = _exported(context, name, ends)
    file, folder = exported / (ENDED if ends.has_ends else FLOAT_ONNX), exported / "engines"
    folder.mkdir()
    forms = [
        Form("onnxruntime", file, "onnxruntime", "fp32", same=True),
        Form("openvino", openvino_from_onnx(file, folder)[0], "openvino", "fp32", same=True),
    ]
    if not ends.has_ends:
        half_onnx(file, folder / "half.onnx")
        forms.append(Form("fp16", folder / "half.onnx", "onnxruntime", "fp16", same=True))
    people = val_people(context).sample(PEOPLE, 0)
    report = side_by_side(Source(find_checkpoint(name)), people, exported, forms)
    return {form.name: report["shifts"][form.name]["p99_px"] for form in forms}


def _in_words(rows: dict[str, dict[str, float]]) -> str:
    parts = (f"{name}: {', '.join(f'{form} {px:.3g}' for form, px in row.items())}" for name, row in rows.items())
    return f"99th percentile over {PEOPLE} people of val, px: {'; '.join(parts)}"


def _exported(context: Context, name: str, ends: Export) -> Path:
    """A zoo network as ONNX, in a folder of the export stage."""

    def work() -> Path:
        from edgepose.stages.export import export
        from edgepose.stages.source import Source

        folder = context.folder / f"{name}-exported{'-ends' if ends.has_ends else ''}"
        folder.mkdir()
        export(Source(find_checkpoint(name)), ends.opset, folder, ends)
        return folder

    return context.once(f"exported {name} {ends.has_ends}", work)


# ----------------------------------------------------------------------------------------------------------- integers


def int8_macs(backend: Backend) -> Callable[[Context], Measured]:
    """Least share of multiplications outside protected parts that an engine really does in integers."""

    def measure(context: Context) -> Measured:
        rows: dict[str, dict[str, Any]] = {}
        for network, recipe in INT8_BUNDLES:
            bundle = compiled(context, network, recipe)
            rows[bundle.manifest.name] = _achieved(bundle, backend)
        worst = min(row["asked_share"] for row in rows.values())
        text = "; ".join(
            f"{name}: {100 * row['asked_share']:.1f} % of what is not protected, {100 * row['share']:.1f} % of all"
            for name, row in rows.items()
        )
        return Measured(worst, text, {"bundles": rows})

    return measure


def _achieved(bundle: Bundle, backend: Backend) -> dict[str, Any]:
    engine = next(engine for engine in bundle.manifest.engines if engine.backend == backend)
    report = bundle.manifest.reports[engine.path.rpartition("/")[0]]
    found: dict[str, Any] = report["int8"]
    return {"share": found["share"], "asked_share": found["asked_share"], "float_layers": found["float_layers"][:8]}


# ------------------------------------------------------------------------------------------------- others, conformance


def foreign_imports(context: Context) -> Measured:
    """Networks in the style of others that are imported, quantised, run and evaluated, and still right in INT8."""
    from benchmarks import foreign

    rows: dict[str, Any] = {}
    for number, (style, kind) in enumerate(foreign.STYLES.items()):
        context.told("importing networks of others", number, len(foreign.STYLES))
        try:
            rows[style] = {"opset": kind.opset, **foreign.taken_all_the_way(context.folder / style, style)}
        except EdgeposeError as err:
            rows[style] = {"opset": kind.opset, "float": 0.0, "int8": 0.0, "error": str(err)}
    right = sum(row["int8"] >= _RIGHT_AP for row in rows.values())
    text = "; ".join(
        f"{style}, opset {row['opset']}: OKS-AP at 0.5 {row['float']:.3f} as it came, {row['int8']:.3f} in INT8"
        for style, row in rows.items()
    )
    return Measured(right, text, {"networks": rows, "right_from": _RIGHT_AP})


_RIGHT_AP = 0.9  # they find discs, which is not hard: less means that something was misread


def api_conformance(context: Context) -> Measured:
    """Attributes of TensorRT that the code touches and a supported version does not have."""
    context.told("walking what is touched of TensorRT", 0, 1)
    tests = Path(__file__).resolve().parents[2] / "tests" / "runtime" / "test_trt_versions.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tests.parents[2], check=False)
    last = ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else ran.stderr[-200:]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}
    if not counts.get("passed"):
        raise EnvironmentFault("tests of TensorRT's interface", found=last, expected="some that pass")
    faults = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    text = f"{last}: every name that is touched, in TensorRT 10.3 to 11.4 and RTX 1.7 as recorded"
    return Measured(faults, text, {"tests": counts})


class _Nobody:
    def started(self, stage: str) -> None: ...
    def finished(self, stage: StageResult) -> None: ...
    def building(self, what: str, done: int, total: int) -> None: ...


CLAIMS = (
    Claim(
        "engines.rtx_aot_models",
        "share",
        ">= 1.0",
        "zoo networks that TensorRT-RTX compiles ahead of time for 4 or more compute capabilities",
        rtx_models,
        needs=(),
    ),
    Claim("engines.parity_px", "px", "<= 0.1", "99th percentile of keypoint shifts, FP32; FP16 / 5", parity),
    Claim(
        "engines.int8_macs_ort",
        "share",
        ">= 0.95",
        "MACs outside protected parts that ONNX Runtime does in INT8, least of all bundles",
        int8_macs("onnxruntime"),
    ),
    Claim(
        "engines.int8_macs_openvino",
        "share",
        ">= 0.95",
        "MACs outside protected parts that OpenVINO does in INT8, least of all bundles",
        int8_macs("openvino"),
    ),
    Claim("engines.build_s", "s", "<= 60", "building kpe-s for all local targets", build_seconds),
    Claim("engines.rebuild_s", "s", "<= 2", "the same again with nothing changed", rebuild_seconds),
    Claim(
        "engines.foreign_imports",
        "networks",
        "== 3",
        "networks in the style of others that are imported, quantised, run and evaluated",
        foreign_imports,
        needs=(),
    ),
    Claim(
        "engines.fused_pre_post_px",
        "px",
        "<= 0.05",
        "99th percentile of keypoint shifts with preprocessing and decoding in the graph",
        fused_ends,
    ),
    Claim(
        "engines.trt_api_conformance",
        "faults",
        "== 0",
        "names of TensorRT touched that a recorded version lacks",
        api_conformance,
        needs=(),
    ),
)
