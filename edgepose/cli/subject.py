"""What `eval` and `inspect` are pointed at: a bundle, a checkpoint, the name of a network in the zoo, or one's own.

Invariant: a folder is a bundle; a name of the zoo is that network, whatever lies in the working directory; what names
code is a network of the user's own (`cli.factory`); everything else is the path of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgepose.blocks.zoo import find_checkpoint, zoo_names
from edgepose.cli.factory import find_source, names_code
from edgepose.errors import MissingDependency, UsageError
from edgepose.estimator import EstimatorOptions, PoseEstimator
from edgepose.spec import Backend, Precision
from edgepose.stages.source import Source


@dataclass(frozen=True, slots=True)
class Subject:
    """A bundle or a checkpoint.

    Attributes:
        text: As it was named.
        path: The bundle's folder, or the checkpoint without suffix.
        is_bundle: Which of the two.
        source: The checkpoint, with the module of a network of the user's own; None for a bundle.
    """

    text: str
    path: Path
    is_bundle: bool
    source: Source | None = None


def find_subject(text: str) -> Subject:
    """What `text` names.

    Raises:
        CheckpointError: No network of that name.
        UsageError: Code that cannot be imported, or is no factory.
        SpecError: A network of the user's own that does not do what its specification says.
    """
    path = Path(text)
    if names_code(text) and not path.is_dir():
        own = find_source(text)
        return Subject(text, own.path, is_bundle=False, source=own)
    if text not in zoo_names() and (path.is_dir() or text.rstrip("/").endswith(".bundle")):
        return Subject(text, path, is_bundle=True)
    if path.with_name(path.name + ".safetensors").is_file() and text not in zoo_names():
        return Subject(text, path, is_bundle=False, source=Source(path))
    found = find_checkpoint(text)
    return Subject(text, found, is_bundle=False, source=Source(found))


@contextmanager
def opened(
    subject: Subject,
    *,
    backend: Backend | None,
    precision: Precision | None,
    threads: int | None,
    flip_test: bool = False,
) -> Iterator[PoseEstimator]:
    """An estimator that runs the subject: a bundle's engine, or a checkpoint in torch.

    Raises:
        UsageError: A checkpoint has no engines to choose from.
        MissingDependency: The runtime, or torch for a checkpoint, is not installed.
        BadInput: It cannot be read.
        IntegrityError: It was changed since it was written.
    """
    if subject.source is None:
        options = EstimatorOptions(flip_test=flip_test)
        with PoseEstimator.from_bundle(
            subject.path, backend, threads, precision, aim="none", options=options
        ) as estimator:
            yield estimator
        return
    for flag, value in (("--backend", backend), ("--precision", precision)):
        if value is not None:
            fix = "leave it off, or compile the checkpoint and name the bundle"
            raise UsageError(flag, found=f"{value} for a checkpoint, which torch runs", expected="a bundle", fix=fix)
    with _checkpoint(subject.source, threads, flip_test=flip_test) as estimator:
        yield estimator


@contextmanager
def _checkpoint(source: Source, threads: int | None, *, flip_test: bool) -> Iterator[PoseEstimator]:
    from edgepose.blocks.card import read_card
    from edgepose.host import physical_cores

    read_card(source.path)  # says at once that there is no checkpoint; torch takes seconds to load
    try:
        import torch

        from edgepose.stages.networks import load_network
        from edgepose.training.session import TorchSession
    except ImportError as err:
        raise MissingDependency(
            err.name or "torch", extra="compile", needed_for=f"running {source.path} in torch"
        ) from err
    torch.set_num_threads(threads or physical_cores())
    network, checkpoint = load_network(source)
    spec = checkpoint.card.spec
    with PoseEstimator(TorchSession(network, spec), spec, backend="torch", flip_test=flip_test) as estimator:
        yield estimator
