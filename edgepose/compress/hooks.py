"""NNCF's function hooks, the few of their operations that quantisation needs, with NNCF kept quiet.

Invariant: all knowledge of how NNCF stores quantisers inside a module is in this file; it prints and sends nothing.

NNCF wraps `forward` so that every torch function called in it has a name, "<module path>/<function>/<call>", and lets
modules ("hooks") stand before or after it. Hooks live in a submodule of the wrapped network.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import nncf
import torch
from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode, OpMeta
from nncf.torch.function_hook.hook_storage import HookStorage
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from nncf.torch.function_hook.wrapper import get_hook_storage, is_wrapped, wrap_model
from nncf.torch.graph.graph import PTNNCFGraph
from torch import Tensor, nn

# The loader of NNCF's compiled kernels warns, logs and draws bars at first use, long after this import.
logging.getLogger("nncf").setLevel(logging.ERROR)
# They are compiled there and then; on a busy machine that takes longer than the minute NNCF allows.
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "900")

_STORAGE = "__nncf_hooks"
_INSTANCE_OVERRIDES = ("forward", "_replicate_for_data_parallel")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps NNCF's progress bars, banners and deprecation warnings off the terminal."""
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        nncf.set_log_level(logging.ERROR)
        yield


def storage_of(wrapped: nn.Module) -> HookStorage:
    return get_hook_storage(wrapped)


def is_hooked(module: nn.Module) -> bool:
    return bool(is_wrapped(module))


def hooks_of(wrapped: nn.Module) -> dict[str, nn.Module]:
    """Hooks by place: "post_hooks.<function>__<port>" or "pre_hooks.<function>__<port>"; shared ones at every place."""
    return {
        name.rpartition(".")[0].replace(":", "."): hook
        for name, hook in storage_of(wrapped).named_hooks(remove_duplicate=False)
    }


def add_hook(wrapped: nn.Module, place: str, hook: nn.Module) -> None:
    """Puts `hook` at a place that has none."""
    storage_of(wrapped).insert_hook_by_name(f"{place.replace('.', ':').replace(':', '.', 1)}.0", hook)


def remove_hook(wrapped: nn.Module, place: str) -> None:
    storage = storage_of(wrapped)
    kind, _, key = place.partition(".")
    del getattr(storage, kind)[key.replace(".", ":")]


def hooked_copy(module: nn.Module) -> nn.Module:
    """A copy of a plain module, able to take hooks."""
    with quiet():
        wrapped: nn.Module = wrap_model(copy.deepcopy(module))
    return wrapped


def plain_copy(wrapped: nn.Module) -> nn.Module:
    """A copy of a hooked module without its hooks: the class, names and weights it was wrapped with."""
    plain = copy.deepcopy(wrapped)
    delattr(plain, _STORAGE)
    for name in _INSTANCE_OVERRIDES:
        plain.__dict__.pop(name, None)
    return plain


def graph_of(wrapped: nn.Module, example: Tensor) -> PTNNCFGraph:
    """The functions called by one forward pass, quantisers among them."""
    training = wrapped.training
    try:
        with quiet(), torch.no_grad():
            return build_nncf_graph(wrapped.eval(), example)
    finally:
        wrapped.train(training)


class _Recorder(FunctionHookMode):  # type: ignore[misc]
    """Notes which functions are called while one of some modules runs."""

    def __init__(self, model: nn.Module, watched: Sequence[nn.Module]) -> None:
        super().__init__(model=model, hook_storage=HookStorage())
        self._watched = {id(module) for module in watched}
        self.inside: list[str] = []

    def execute_pre_hooks(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], op_meta: OpMeta
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if any(id(module) in self._watched for module in self.module_call_stack):
            self.inside.append(op_meta.op_name)
        return super().execute_pre_hooks(args, kwargs, op_meta)  # type: ignore[no-any-return]


def functions_inside(module: nn.Module, names: Sequence[str], example: Tensor) -> tuple[str, ...]:
    """NNCF's names of the functions that the named submodules call.

    NNCF's paths leave out containers that are never called (a ModuleList), so they cannot be had from the module names.
    """
    watched = [part for name in names for part in module.get_submodule(name).modules()]
    with torch.no_grad(), _Recorder(module, watched) as recorder:
        module(example)
    return tuple(recorder.inside)
