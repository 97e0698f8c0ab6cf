"""OpenVINO on the CPU.

Invariant: the precision of the arithmetic is pinned: OpenVINO never drops to bfloat16 just because the processor can.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from edgepose.errors import BackendUnavailable, BadInput, EnvironmentFault, OnnxError
from edgepose.runtime.session import Array, ClosedSession, check_feeds
from edgepose.spec import Precision, TensorSpec
from edgepose.telemetry import block_telemetry

block_telemetry()

import openvino  # noqa: E402 - importing it phones home otherwise


@cache
def shared_core() -> openvino.Core:
    """The one core of this process, never freed.

    OpenVINO's CPU plugin gives the thread that loads it a signal stack and frees it with its last core; where that
    happens on another thread, the pointer stays behind and the next Ctrl-C ends the process with a segmentation fault.
    """
    return openvino.Core()


_HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16", "fp16": "f16"}
"""INT8 comes from the Q/DQ (FakeQuantize) operations of the graph; the hint is for what stays float."""


class OpenvinoSession:
    """A network compiled by OpenVINO for the CPU.

    Args:
        path: The .xml of an IR (its .bin beside it) or an .onnx file.
        threads: Threads of inference, at least 1.
        precision: Arithmetic of what is not quantised.

    Raises:
        OnnxError: The ONNX file is missing or cannot be loaded.
        BadInput: The same, of an IR.
        BackendUnavailable: This processor has no arithmetic of that precision.
    """

    def __init__(self, path: Path, *, threads: int, precision: Precision = "fp32") -> None:
        core = shared_core()
        _require_precision(core, precision)
        config = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            # Reading first tells a broken file from a network that this CPU plugin cannot run.
            model = core.read_model(str(path))
        except RuntimeError as err:
            kind = OnnxError if path.suffix == ".onnx" else BadInput
            found = "no such file" if not path.is_file() else f"OpenVINO refuses it: {_gist(err)}"
            raise kind(str(path), found=found, expected="an OpenVINO IR (.xml beside its .bin) or ONNX model") from err
        try:
            compiled = core.compile_model(model, "CPU", config)
        except RuntimeError as err:
            raise BackendUnavailable("OpenVINO CPU", found=f"{path} does not compile: {_gist(err)}") from err
        self._request: openvino.InferRequest | None = compiled.create_infer_request()
        self.inputs = tuple(_tensor_spec(port) for port in compiled.inputs)
        self.outputs = tuple(_tensor_spec(port) for port in compiled.outputs)

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.infer`."""
        if self._request is None:
            raise ClosedSession
        checked = check_feeds(feeds, self.inputs)
        try:
            # Inputs are read in place; outputs are copied, as the request reuses its own buffers at the next call.
            results = self._request.infer(checked, share_inputs=True, share_outputs=False)
        except RuntimeError as err:
            raise EnvironmentFault("OpenVINO", found=f"inference failed: {_gist(err)}") from err
        return {spec.name: results[index] for index, spec in enumerate(self.outputs)}

    def close(self) -> None:
        """See `Session.close`."""
        self._request = None


def _require_precision(core: openvino.Core, precision: Precision) -> None:
    if precision in ("fp32", "int8"):
        return
    offered = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision.upper() not in offered:
        raise BackendUnavailable(
            "OpenVINO CPU",
            found=f"a processor that offers {', '.join(offered)}",
            expected=precision.upper(),
            fix="choose another precision",
        )


def _tensor_spec(port: Any) -> TensorSpec:
    shape = tuple(
        size.get_length() if size.is_static else ("batch" if axis == 0 else f"dim{axis}")
        for axis, size in enumerate(port.partial_shape)
    )
    return TensorSpec(name=_name_of(port), shape=shape, dtype=str(port.element_type.to_dtype()))


def _name_of(port: Any) -> str:
    """The name that the network's file gives an input or output; the tensor behind it may have others, too."""
    names = port.get_names()
    own = str(port.get_node().get_friendly_name()).partition("/sink_port_")[0]
    return own if own in names else str(port.any_name)


def _gist(err: RuntimeError) -> str:
    """The last line that says something; the ones before it tell where in OpenVINO's sources it was thrown."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[-1] if lines else type(err).__name__
