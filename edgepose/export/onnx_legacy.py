"""torch → ONNX by way of TorchScript, for operator sets that torch's exporter of today does not write.

Invariant: what comes out says the same as what today's exporter gives: the names of inputs and outputs, sizes that are
numbers but for the batch, and the module that each convolution and matrix product came from. Whether it computes the
same is for the caller to check.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from torch import Tensor, nn

from edgepose.errors import OnnxError
from edgepose.export.notes import HEAVY
from edgepose.spec import ModelSpec


def export_legacy(model: nn.Module, spec: ModelSpec, opset: int, example: Tensor) -> tuple[ir.Model, dict[str, str]]:
    """Exports a network.

    Args:
        model: The network, in eval mode.
        spec: Names and shapes of its input and outputs.
        opset: ONNX operator set, 9..20.
        example: (N, 3, h, w) float32.

    Returns:
        The graph, and the module of each convolution and matrix product by the name of its node.

    Raises:
        OnnxError: TorchScript or ONNX cannot say the network in that operator set.
    """
    names = [value.name for value in (*spec.inputs, *spec.outputs)]
    written = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated, and constants of the trace
            torch.onnx.export(
                model,
                (example,),
                written,  # type: ignore[arg-type]  # the annotation knows paths only; files are written to as well
                dynamo=False,
                opset_version=opset,
                input_names=[value.name for value in spec.inputs],
                output_names=[value.name for value in spec.outputs],
                dynamic_axes={name: {0: str(spec.inputs[0].shape[0])} for name in names},
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as err:
        found = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise OnnxError(f"exporting {spec.name} by TorchScript", found=found, expected=f"opset {opset}") from err
    exported = ir.from_proto(onnx.load_from_string(written.getvalue()))
    LiftConstantsToInitializersPass(lift_all_constants=True)(exported)
    for value, said in zip(exported.graph.outputs, spec.outputs, strict=True):
        value.shape = ir.Shape(list(said.shape))  # sizes behind a reshape are left open by TorchScript
    return exported, _modules(exported, [name for name, _ in model.named_modules()])


def _modules(model: ir.Model, known: Iterable[str]) -> dict[str, str]:
    """Modules from TorchScript's node names: "/stem/stem.0/stem.0.1/Conv" is of stem.0.1."""
    modules = [name for name in known if name]
    found = {}
    for node in model.graph:
        if node.op_type in HEAVY and node.name:
            path = ""
            for part in re.findall(r"[^/]+", node.name)[:-1]:
                inside = [name for name in modules if not path or name.startswith(f"{path}.")]
                ends = [name for name in inside if name == part or name.endswith(f".{part}")]
                path = min(ends, key=len, default=path)
            found[node.name] = path
    return found
