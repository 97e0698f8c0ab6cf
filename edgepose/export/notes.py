"""What an ONNX file of edgepose says of its own nodes: which module each came from, and what is float on purpose.

Invariant: notes are metadata; a file without them is as good a network. Importing this loads no torch: devices read it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import TypeVar

import msgspec
import onnx_ir as ir

from edgepose.errors import OnnxError

MODULES_KEY = "edgepose.modules"
FLOATS_KEY = "edgepose.float"

HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators whose multiplications are counted."""

_SCOPES = "pkg.torch.onnx.name_scopes"

T = TypeVar("T")


class FloatNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A convolution or matrix product that a quantised graph leaves in floating point on purpose.

    Attributes:
        node: Its name in the graph.
        protected: Whether it belongs to a protected module.
    """

    node: str
    protected: bool


def note_modules(model: ir.Model) -> None:
    """Writes down, in the model's metadata, which module each convolution and matrix product came from.

    Call before the exporter's own notes are removed: they are where it stands.
    """
    modules = {}
    for node in model.graph:
        if node.op_type in HEAVY and node.name:
            scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))  # "['', 'head', 'head.x', 'linear']"
            modules[node.name] = str(scopes[-2]) if len(scopes) > 1 else ""
    model.metadata_props[MODULES_KEY] = msgspec.json.encode(modules).decode()


def note_known_modules(model: ir.Model, modules: Mapping[str, str]) -> None:
    """Writes down which module each node came from, where that is known otherwise."""
    model.metadata_props[MODULES_KEY] = msgspec.json.encode(dict(modules)).decode()


def modules_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Module names by node, from a model's metadata; empty where a file of another origin has none."""
    return _noted(metadata, MODULES_KEY, dict[str, str], {})


def floats_of(metadata: Mapping[str, str]) -> tuple[FloatNode, ...]:
    """What a quantised graph leaves in floating point, from its metadata; empty where there is no note."""
    return _noted(metadata, FLOATS_KEY, tuple[FloatNode, ...], ())


def _noted(metadata: Mapping[str, str], key: str, kind: type[T], default: T) -> T:
    try:
        return msgspec.json.decode(metadata[key], type=kind) if key in metadata else default
    except msgspec.DecodeError as err:
        raise OnnxError(f"metadata {key}", found=str(err), expected="what edgepose wrote there") from err
