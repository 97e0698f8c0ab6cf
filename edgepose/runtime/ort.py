"""ONNX Runtime: its execution providers, what they are told, and where the nodes of a network landed.

Invariant: a provider that was asked for and is not there is an error, never a silent run on the CPU; worker threads do
not spin unless asked to, so that two sessions in one process do not slow each other down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from edgepose.errors import BackendUnavailable, EnvironmentFault, OnnxError, UsageError
from edgepose.host import cache_directory, core_cpus, fingerprint
from edgepose.runtime.session import Array, ClosedSession, SessionFacts, check_feeds
from edgepose.spec import Execution, OrtOptions, OrtProvider, Precision, TensorSpec
from edgepose.storage import atomic_file

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

PROVIDERS: dict[OrtProvider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
"""What edgepose calls ONNX Runtime's execution providers, and what it calls them itself."""

_PACKAGES: dict[OrtProvider, str] = {
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "openvino": "onnxruntime-openvino",
    "coreml": "onnxruntime on macOS",
    "directml": "onnxruntime-directml",
    "xnnpack": "an onnxruntime that is built with XNNPACK",
}
_BUFFERS: dict[OrtProvider, str] = {"cuda": "cuda", "tensorrt": "cuda", "directml": "dml"}
_COMPILING: frozenset[OrtProvider] = frozenset({"tensorrt", "openvino", "coreml", "xnnpack"})
"""Providers that put what they compile in the place of nodes: such graphs cannot be saved."""

_LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def available_providers() -> tuple[str, ...]:
    """The execution providers that the installed ONNX Runtime has, by edgepose's names where there are such."""
    ours = {theirs: name for name, theirs in PROVIDERS.items()}
    return tuple(ours.get(name, name) for name in onnxruntime.get_available_providers())


class OrtSession:
    """A network in ONNX Runtime.

    Args:
        path: The .onnx or .ort file.
        threads: Intra-op threads, at least 1.
        precision: What arithmetic the network is written in; TensorRT and OpenVINO as providers have to be told.
        execution: Providers and the rest.
        optimise: Whether the graph is optimised as `execution` says; False computes node by node what the file says.
        quiet: Whether ONNX Runtime keeps its own account of errors to itself: where they are expected.

    Raises:
        OnnxError: The file is missing or cannot be loaded.
        BackendUnavailable: A provider is not there, or does not take what `strict` demands.
        UsageError: Options that exclude each other.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        precision: Precision = "fp32",
        execution: Execution | None = None,
        optimise: bool = True,
        quiet: bool = False,
    ) -> None:
        execution = execution or Execution()
        chosen = execution.onnxruntime
        _check_providers(chosen)
        options = _session_options(threads, execution)
        if not optimise:
            options.graph_optimization_level = _LEVELS["none"]
        # Warnings about optimised-away initialisers are no use to anyone here.
        options.log_severity_level = 4 if quiet else 3
        providers = [(PROVIDERS[name], provider_options(name, threads, precision)) for name in chosen.providers]
        load = _load_optimised if chosen.save_optimised and optimise else _load
        self._session: onnxruntime.InferenceSession | None = load(path, options, providers)
        self._options, self._threads = chosen, threads
        started = self._session.get_providers()
        for name in chosen.providers:
            if PROVIDERS[name] not in started:
                found = f"that ONNX Runtime could not start it (its own log says why) and runs {', '.join(started)}"
                raise BackendUnavailable(f"ONNX Runtime provider {name}", found=found, fix=_remedy(name))
        self.inputs = tuple(_tensor_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_tensor_spec(node) for node in self._session.get_outputs())
        self._names = [spec.name for spec in self.outputs]
        self._binding = _Binding(self._session, _BUFFERS.get(chosen.providers[0], "cpu")) if chosen.io_binding else None
        if chosen.strict:
            _check_strict(path, self.facts().placement, chosen.providers)

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.infer`."""
        if self._session is None:
            raise ClosedSession
        checked = check_feeds(feeds, self.inputs)
        try:
            results = self._session.run(self._names, checked) if self._binding is None else self._binding.run(checked)
        except _FAULTS as err:
            raise EnvironmentFault("ONNX Runtime", found=f"inference failed: {err}") from err
        return dict(zip(self._names, results, strict=True))

    def facts(self) -> SessionFacts:
        """See `SessionFacts`."""
        if self._session is None:
            raise ClosedSession
        ours = {theirs: name for name, theirs in PROVIDERS.items()}
        placement: dict[str, list[str]] = {}
        tell = getattr(self._session, "get_provider_graph_assignment_info", None)
        for part in tell() if tell is not None else ():  # older versions do not tell
            nodes = placement.setdefault(ours.get(part.ep_name, part.ep_name), [])
            nodes += [f"{node.name} ({node.op_type})" if node.name else node.op_type for node in part.get_nodes()]
        options = self._session.get_session_options()
        settings = {
            "threads": str(options.intra_op_num_threads),
            "streams": str(options.inter_op_num_threads),
            "optimisation": self._options.optimisation,
            "io_binding": "yes" if self._binding else "no",
        }
        return SessionFacts({name: tuple(nodes) for name, nodes in placement.items()}, settings)

    def close(self) -> None:
        """See `Session.close`."""
        self._session = self._binding = None


class _Binding:
    """Inputs that stay in one place for as long as their shapes do, fed to a session that is told where they are.

    Args:
        session: The session.
        device: Where the inputs lie, as ONNX Runtime calls it.
    """

    def __init__(self, session: onnxruntime.InferenceSession, device: str) -> None:
        self._session, self._device = session, device
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        for name, value in feeds.items():
            held = self._inputs.get(name)
            if held is None or tuple(held.shape()) != value.shape:
                held = onnxruntime.OrtValue.ortvalue_from_shape_and_type(value.shape, value.dtype, self._device, 0)
                self._inputs[name] = held
                self._binding.bind_ortvalue_input(name, held)
            held.update_inplace(value)
        self._binding.clear_binding_outputs()  # those of the last run belong to whoever asked for them
        for output in self._session.get_outputs():
            self._binding.bind_output(output.name)
        self._session.run_with_iobinding(self._binding)
        return [np.asarray(value) for value in self._binding.copy_outputs_to_cpu()]


def provider_options(provider: OrtProvider, threads: int, precision: Precision) -> dict[str, str]:
    """What a provider is told besides the session's own options.

    FP32 means FP32: CUDA's TF32 and the providers' own narrower choices are off. INT8 comes from the Q/DQ of the graph.
    """
    match provider:
        case "cpu" | "directml":
            return {}
        case "cuda":
            return {"use_tf32": "0"}
        case "tensorrt":
            flags = {"trt_fp16_enable": precision == "fp16", "trt_int8_enable": precision == "int8"}
            return {name: "1" if flag else "0" for name, flag in flags.items()}
        case "openvino":
            widths = {"fp32": "FP32", "int8": "FP32", "fp16": "FP16", "bf16": "ACCURACY"}
            return {"device_type": "CPU", "num_of_threads": str(threads), "precision": widths[precision]}
        case "coreml":
            return {"ModelFormat": "MLProgram"}
        case "xnnpack":
            return {"intra_op_num_threads": str(threads)}
        case _:
            assert_never(provider)


def _session_options(threads: int, execution: Execution) -> onnxruntime.SessionOptions:
    chosen, options = execution.onnxruntime, onnxruntime.SessionOptions()
    options.graph_optimization_level = _LEVELS[chosen.optimisation]
    options.intra_op_num_threads = 1 if "xnnpack" in chosen.providers else threads  # it brings threads of its own
    options.inter_op_num_threads = max(1, execution.streams)
    if execution.streams > 1:
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    if "directml" in chosen.providers:  # it demands both
        options.enable_mem_pattern = False
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if chosen.spinning else "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "1" if chosen.spinning else "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if execution.affinity == "pinned" and options.intra_op_num_threads > 1:
        cores = core_cpus()
        # One entry for each thread but the caller's; ONNX Runtime counts processors from 1.
        workers = [str(cores[index % len(cores)] + 1) for index in range(1, options.intra_op_num_threads)]
        options.add_session_config_entry("session.intra_op_thread_affinities", ";".join(workers))
    return options


def _check_providers(chosen: OrtOptions) -> None:
    available = available_providers()
    for name in chosen.providers:
        if name not in available:
            raise BackendUnavailable(
                f"ONNX Runtime provider {name}",
                found=f"an ONNX Runtime {onnxruntime.__version__} that has {', '.join(available)}",
                expected=f"{name} among them",
                fix=_remedy(name),
            )
    compiling = [name for name in chosen.providers if name in _COMPILING]
    if chosen.save_optimised and compiling:
        found = f"{compiling[0]}, which compiles what it takes"
        raise UsageError("save_optimised", found=found, expected="providers that run nodes", fix="leave it off")


def _remedy(name: OrtProvider) -> str:
    return f"install {_PACKAGES[name]}, or name another provider" if name in _PACKAGES else "name another provider"


def _load(path: Path, options: Any, providers: Sequence[tuple[str, dict[str, str]]]) -> onnxruntime.InferenceSession:
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except _FAULTS as err:
        raise OnnxError(str(path), found=f"ONNX Runtime refuses it: {err}", expected="a valid ONNX model") from err
    session.disable_fallback()  # else a provider that fails is exchanged for the CPU in the middle of a run
    return session


def _load_optimised(
    path: Path, options: Any, providers: Sequence[tuple[str, dict[str, str]]]
) -> onnxruntime.InferenceSession:
    """The rewritten graph of a network, from this host's cache, or made now and kept there.

    It holds layouts and kernels of the very processor and ONNX Runtime, which are in the cache's key.
    """
    if not path.is_file():
        return _load(path, options, providers)  # which says so
    level = options.graph_optimization_level
    identity = f"{int(level)} {providers} {fingerprint().digest}".encode() + hashlib.sha256(path.read_bytes()).digest()
    kept = cache_directory() / "onnxruntime" / f"{hashlib.sha256(identity).hexdigest()[:32]}.onnx"
    if kept.is_file():
        options.graph_optimization_level = _LEVELS["none"]
        try:
            return _load(kept, options, providers)
        except OnnxError:  # cut short, or changed
            kept.unlink(missing_ok=True)
            options.graph_optimization_level = level
    with atomic_file(kept) as temporary:
        options.optimized_model_filepath = str(temporary)
        options.log_severity_level = max(3, options.log_severity_level)  # it warns of what the key takes care of
        return _load(path, options, providers)


def _check_strict(path: Path, placement: Mapping[str, Sequence[str]], providers: Sequence[OrtProvider]) -> None:
    if not placement:
        found = f"ONNX Runtime {onnxruntime.__version__}, which does not say where nodes run"
        fix = "update it: pip install --upgrade onnxruntime"
        raise BackendUnavailable(f"strict: {path}", found=found, expected="a newer one", fix=fix)
    elsewhere = {name: nodes for name, nodes in placement.items() if name not in providers}
    if elsewhere:
        total = sum(map(len, placement.values()))
        name, nodes = max(elsewhere.items(), key=lambda item: len(item[1]))
        found = f"{sum(map(len, elsewhere.values()))} of {total} nodes elsewhere, {nodes[0]} on {name} the first"
        fix = "leave strict off, or name that provider as well"
        raise BackendUnavailable(f"strict: {path}", found=found, expected=f"all on {', '.join(providers)}", fix=fix)


def _tensor_spec(node: onnxruntime.NodeArg) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else size or f"dim{axis}" for axis, size in enumerate(node.shape))
    return TensorSpec(name=node.name, shape=shape, dtype=_DTYPES.get(node.type, node.type))
