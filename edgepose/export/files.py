"""Reading and writing ONNX files that edgepose rewrites.

Invariant: what is not an ONNX file is said to be so, by name; nothing that the checker of ONNX refuses is left behind.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs are installed

from edgepose.errors import OnnxError
from edgepose.storage import atomic_file


def read_graph(path: str | os.PathLike[str], *, inferred: bool = False) -> ir.Model:
    """A file's graph.

    Args:
        path: An ONNX file.
        inferred: With the type and shape of every value between operators, as far as ONNX can tell.

    Raises:
        OnnxError: Not there, not an ONNX file, or one without operators, which is what Protobuf makes of an empty one.
    """
    try:
        model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(path))) if inferred else ir.load(Path(path))
    except OSError as err:
        raise OnnxError(str(path), found=err.strerror or str(err), expected="an ONNX file") from err
    except (DecodeError, ValueError, RuntimeError, onnx.shape_inference.InferenceError) as err:
        raise OnnxError(str(path), found=str(err), expected="a readable ONNX file") from err
    if not len(model.graph):
        raise OnnxError(str(path), found="a network without operators", expected="an ONNX file")
    return model


def write_graph(model: ir.Model, out: str | os.PathLike[str], *, what: str = "a valid graph") -> None:
    """Writes a graph, checked, in one step.

    Args:
        model: The graph.
        out: The file; replaced if it is there.
        what: What should have been written, for the error.

    Raises:
        OnnxError: ONNX's checker refuses it; `out` is as before.
        StorageError: Disk full, read-only or no permission.
    """
    with atomic_file(out) as temporary:
        ir.save(model, temporary)
        try:
            onnx.checker.check_model(str(temporary), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
            raise OnnxError(str(out), found=str(err), expected=what) from err
