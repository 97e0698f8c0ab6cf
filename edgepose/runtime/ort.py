"""ONNX Runtime on the CPU.

Invariant: graph optimisations are all on and worker threads do not spin unless asked otherwise, so that two sessions in
one process do not slow each other down.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from edgepose.errors import EnvironmentFault, OnnxError
from edgepose.runtime.session import Array, ClosedSession, check_feeds
from edgepose.spec import TensorSpec

_FAULTS = (
    native.EPFail,
    native.EngineError,
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoModel,
    native.NoSuchFile,
    native.NotImplemented,
    native.RuntimeException,
)
"""ONNX Runtime's exceptions have no base class of their own."""

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OrtSession:
    """A network in ONNX Runtime's CPU provider.

    Args:
        path: The .onnx or .ort file.
        threads: Intra-op threads, at least 1.
        spinning: Whether idle worker threads wait actively: a little faster alone, ruinous beside other work.
        optimise: Whether the graph is optimised; False computes node by node what the file says.
        quiet: Whether ONNX Runtime keeps its own account of errors to itself: where they are expected.

    Raises:
        OnnxError: The file is missing or cannot be loaded.
    """

    def __init__(
        self, path: Path, *, threads: int, spinning: bool = False, optimise: bool = True, quiet: bool = False
    ) -> None:
        options = onnxruntime.SessionOptions()
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Warnings about optimised-away initialisers are no use to anyone here.
        options.log_severity_level = 4 if quiet else 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except _FAULTS as err:
            raise OnnxError(str(path), found=f"ONNX Runtime refuses it: {err}", expected="a valid ONNX model") from err
        self._session: onnxruntime.InferenceSession | None = session
        self.inputs = tuple(_tensor_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_tensor_spec(node) for node in session.get_outputs())
        self._names = [spec.name for spec in self.outputs]

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.infer`."""
        if self._session is None:
            raise ClosedSession
        checked = check_feeds(feeds, self.inputs)
        try:
            results = self._session.run(self._names, checked)
        except _FAULTS as err:
            raise EnvironmentFault("ONNX Runtime", found=f"inference failed: {err}") from err
        return dict(zip(self._names, results, strict=True))

    def close(self) -> None:
        """See `Session.close`."""
        self._session = None


def _tensor_spec(node: onnxruntime.NodeArg) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else size or f"dim{axis}" for axis, size in enumerate(node.shape))
    return TensorSpec(name=node.name, shape=shape, dtype=_DTYPES.get(node.type, node.type))
