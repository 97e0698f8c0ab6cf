"""A network of the user's own on the command line: `package.module:factory`, with `@CHECKPOINT` for weights made of it.

Invariant: the only code that is ever imported is what the user wrote on the command line, and what that imports itself;
no card, plan, recipe or bundle names code. What a factory hands over is run once and held against its specification
before any verb works with it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from edgepose.blocks.card import read_card
from edgepose.blocks.zoo import find_checkpoint
from edgepose.errors import CheckpointError, EdgeposeError, MissingDependency, SpecError, UsageError
from edgepose.host import cache_directory
from edgepose.pose.codec import output_names
from edgepose.spec import ModelSpec, TensorSpec
from edgepose.stages.source import Network, Source

if TYPE_CHECKING:
    from torch import Tensor

_SPELLING = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<factory>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")
_WANTED = "a function without arguments that returns (nn.Module, ModelSpec), or a network with a spec"
_BATCH = 2  # of the trial run; not 1, which a network may have taken for granted
_IMAGE = ("batch", 3)


def names_code(text: str) -> bool:
    """Whether `text` names a network by code, not one of the zoo or a checkpoint: a colon that is no part of a path."""
    named = text.partition("@")[0]
    return ":" in named and "/" not in named and not named.endswith((".safetensors", ".json"))


def find_source(text: str) -> Source:
    """What a verb starts from: a network of the zoo, a checkpoint, or a network of the user's own.

    Args:
        text: A name of the zoo, a path, `package.module:factory`, or `package.module:factory@CHECKPOINT` for a
            checkpoint that edgepose made of that network.

    Raises:
        CheckpointError: No network of that name; a checkpoint of another network; a module that cannot be traced.
        UsageError: The code cannot be imported, or is no factory.
        SpecError: The network does not do what its specification says.
        MissingDependency: torch is not installed.
    """
    if not names_code(text):
        return Source(find_checkpoint(text))
    named, at, checkpoint = text.partition("@")
    network = network_of(named)
    if at:
        return Source(_checkpoint_of(text, checkpoint, network), network.module)
    from edgepose.stages.networks import store_network

    return Source(store_network(network, cache_directory() / "modules"), network.module)


def network_of(named: str) -> Network:
    """Import a module, call its factory and check what it returns.

    Weights that the factory leaves to torch's random numbers are the same at every call.

    Args:
        named: `package.module:factory`; looked for where Python looks, and at last in the working directory.

    Raises:
        UsageError: The code cannot be imported, or is no factory.
        SpecError: The network does not do what its specification says.
        MissingDependency: torch is not installed.
    """
    parts = _SPELLING.fullmatch(named)
    if parts is None:
        raise UsageError(named, found="no name of code", expected="package.module:factory, or a path with a slash")
    try:
        import torch
    except ImportError as err:
        raise MissingDependency("torch", extra="compile", needed_for=f"running {named}") from err
    with _working_directory_too(), torch.random.fork_rng(devices=[]):
        factory = _found(named, parts["module"], parts["factory"])
        torch.manual_seed(0)  # after the import, which may draw numbers and happens once
        try:
            made = factory()  # type: ignore[operator]  # whether it is callable was looked at
        except EdgeposeError:
            raise
        except (Exception, SystemExit) as err:
            raise UsageError(
                f"{named}()",
                found=f"{type(err).__name__}: {_first_line(err)}",
                expected=_WANTED,
                fix="call it in Python to see where; --debug shows the traceback",
            ) from err
        network = _as_network(named, made)
        check_network(named, network)
    return network


def check_network(name: str, network: Network) -> None:
    """Run a network once, on grey images, and hold what it says against its specification.

    Args:
        name: What errors call it.
        network: The network; it is not changed.

    Raises:
        SpecError: Inputs or outputs are not those of the specification.
    """
    spec = network.spec
    image = TensorSpec("image", (*_IMAGE, *spec.preprocess.input_hw))
    if len(spec.inputs) != 1 or not _fits(spec.inputs[0], (_BATCH, 3, *spec.preprocess.input_hw)):
        found = ", ".join(f"{tensor.name} {_shape(tensor)}" for tensor in spec.inputs) or "none"
        raise SpecError(f"{name}: spec.inputs", found=found, expected=f"one, {_shape(image)}, as preprocess says")
    names = tuple(tensor.name for tensor in spec.outputs)
    read = output_names(spec.decoder)
    if names[: len(read)] != read or len(set(names)) < len(names):
        raise SpecError(
            f"{name}: spec.outputs",
            found=", ".join(names) or "none",
            expected=f"{', '.join(read)} first, which the decoder reads, and no name twice",
        )
    for role, named in (("visibility", spec.visibility), ("uncertainty", spec.uncertainty)):
        if named and named not in names:
            raise SpecError(f"{name}: spec.{role}", found=repr(named), expected=f"one of {', '.join(names)}, or ''")
    outputs = _outputs(name, network)
    if len(outputs) != len(names):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in outputs)
        raise SpecError(
            f"{name}: outputs", found=f"{len(outputs)} ({shapes})", expected=f"{len(names)}: {', '.join(names)}"
        )
    for tensor, output in zip(spec.outputs, outputs, strict=True):
        dtype = str(output.dtype).removeprefix("torch.")
        if not _fits(tensor, tuple(output.shape)) or dtype != tensor.dtype:
            raise SpecError(
                f"{name}: output {tensor.name!r}",
                found=f"{dtype} {tuple(output.shape)} for {_BATCH} images",
                expected=f"{tensor.dtype} {_shape(tensor)}, as its spec says",
                fix="correct the spec, or take it from edgepose.blocks.attach.describe",
            )


def _checkpoint_of(text: str, name: str, network: Network) -> Path:
    """The checkpoint behind the @, which has to be one of that network."""
    if not name:
        raise UsageError(text, found="nothing behind @", expected="package.module:factory@CHECKPOINT")
    path = find_checkpoint(name)
    own = read_card(path).own
    if own is None:
        raise CheckpointError(
            text,
            found=f"{name}, a network that edgepose builds by itself",
            expected="a checkpoint that was made of the factory's network",
            fix=f"name {name} alone",
        )
    if own.spec != network.spec:
        raise CheckpointError(
            text,
            found=f"{name}, whose specification is another than the factory's",
            expected="the specification that it was made with",
            fix="let the factory return that one, or begin with the factory alone",
        )
    return path


@contextmanager
def _working_directory_too() -> Iterator[None]:
    """Meanwhile modules are looked for in the working directory as well, after all other places.

    Last, so that a file there stands in for no installed package; not at all where Python was told to leave it out.
    """
    here = str(Path.cwd())
    if sys.flags.safe_path or here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _found(named: str, module: str, factory: str) -> object:
    """What the name stands for, something that can be called."""
    try:
        found: object = import_module(module)
    except ModuleNotFoundError as err:
        if err.name is not None and f"{module}.".startswith(f"{err.name}."):
            fix = "check the name, run from the folder that holds it, or install it"
            raise UsageError(named, found=f"no module {err.name!r}", expected="one that Python finds", fix=fix) from err
        raise _import_fault(named, module, err) from err
    except (Exception, SystemExit) as err:  # it is anyone's code
        raise _import_fault(named, module, err) from err
    for attribute in factory.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as err:
            raise UsageError(named, found=f"no {attribute!r} in {module}", expected=_WANTED) from err
    if not callable(found) or _is_network(found):
        raise UsageError(named, found=f"an object of type {type(found).__name__}", expected=_WANTED)
    return found


def _import_fault(named: str, module: str, err: BaseException) -> UsageError:
    return UsageError(
        named,
        found=f"a module whose import fails with {type(err).__name__}: {_first_line(err)}",
        expected="a module that can be imported",
        fix=f"import {module} in Python to see where; --debug shows the traceback",
    )


def _is_network(found: object) -> bool:
    from torch import nn

    return isinstance(found, nn.Module | Network)


def _as_network(named: str, made: object) -> Network:
    from torch import nn

    match made:
        case Network():
            return made
        case (nn.Module() as module, ModelSpec() as spec):
            return Network(module, spec)
        case nn.Module() if isinstance(own := getattr(made, "spec", None), ModelSpec):
            return Network(made, own)
    kinds = ", ".join(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
    found = f"({kinds})" if isinstance(made, tuple) else f"{kinds} without a spec" if _is_network(made) else kinds
    raise UsageError(f"{named}()", found=found, expected=_WANTED)


def _outputs(name: str, network: Network) -> tuple[Tensor, ...]:
    import torch

    shape = (_BATCH, 3, *network.spec.preprocess.input_hw)
    modes = [(part, part.training) for part in network.module.modules()]
    network.module.eval()
    try:
        with torch.no_grad():
            made = network.module(torch.zeros(shape))
    except Exception as err:
        raise SpecError(
            f"{name}: forward",
            found=f"{type(err).__name__}: {_first_line(err)}",
            expected=f"a network for images of {shape}, as its spec says",
        ) from err
    finally:
        for part, training in modes:
            part.training = training
    if not isinstance(made, tuple | list) or not all(isinstance(tensor, torch.Tensor) for tensor in made):
        fix = "return (output,)" if isinstance(made, torch.Tensor) else "return them in the order of spec.outputs"
        raise SpecError(f"{name}: forward", found=f"a {type(made).__name__}", expected="a tuple of tensors", fix=fix)
    return tuple(made)


def _fits(tensor: TensorSpec, shape: tuple[int, ...]) -> bool:
    """Whether a shape for `_BATCH` images is what the specification says; free sizes are, whatever they are."""
    return len(tensor.shape) == len(shape) and all(
        isinstance(said, str) or said == size for said, size in zip(tensor.shape, shape, strict=True)
    )


def _shape(tensor: TensorSpec) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _first_line(err: BaseException) -> str:
    return str(err).partition("\n")[0]
