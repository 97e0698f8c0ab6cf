"""Engines of TensorRT and TensorRT-RTX: loaded once they are proven to be ours, executed from pinned memory as a graph.

Invariant: no byte of an engine reaches TensorRT before its fingerprint was compared with this machine and its origin
was proven (`provenance.trusted_plan`); everything that was taken from CUDA is given back, whatever fails.

An inference is: copy into pinned memory, then on one stream to the device, through the network and back, then wait.
After a change of shapes it is enqueued once as it is, because TensorRT prepares itself then; the next one is captured
as a CUDA graph, and those that follow launch the graph. What cannot be captured is enqueued anew each time.
TensorRT-RTX captures by itself, and is asked to.

What has run: all of it over a TensorRT made of Python and a CUDA made of C (tests/runtime/fake_tensorrt.py,
fakecudart.c), and every attribute of TensorRT that is touched was found in the recorded interfaces of TensorRT 10.3 to
11.4 and RTX 1.7. On a real GPU, nothing here has run yet.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from edgepose.errors import BackendUnavailable, BadInput, EnvironmentFault, IntegrityError, SpecError
from edgepose.host import fingerprint
from edgepose.runtime.cuda import Cuda, CudaError, open_cuda
from edgepose.runtime.provenance import (
    STRIPPED_WEIGHTS,
    EngineHost,
    Provenance,
    current_platform,
    digest_of,
    rebuild_command,
    trusted_plan,
)
from edgepose.runtime.session import Array, ClosedSession, check_feeds
from edgepose.runtime.trt_diagnosis import missing_fault
from edgepose.runtime.trt_versions import Flavour, TrtApi, import_trt
from edgepose.spec import CudaChoice, TensorrtExecution, TensorSpec

TRUSTED_KEYS = "EDGEPOSE_TRUSTED_KEYS"
"""Environment variable: public keys (Ed25519, PEM) of those whose engines are loaded here, separated as in PATH."""

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""Input → smallest, best and largest shape."""

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


@dataclass(frozen=True, slots=True)
class TensorrtOptions:
    """How engines are executed.

    Attributes:
        cuda: Who calls CUDA; a `Cuda` of one's own will do.
        graphs: Whether CUDA graphs are used.
        trusted_keys: Public keys (Ed25519, PEM) of those whose engines are loaded, besides the ones built here.
        dla_core: The DLA core that engines with DLA layers run on.
    """

    cuda: CudaChoice | Cuda = "auto"
    graphs: bool = True
    trusted_keys: tuple[Path, ...] = ()
    dla_core: int = 0

    @classmethod
    def of(cls, execution: TensorrtExecution) -> Self:
        """As a target or the caller says; keys are this machine's business: those of $EDGEPOSE_TRUSTED_KEYS."""
        keys = tuple(Path(key) for key in os.environ.get(TRUSTED_KEYS, "").split(os.pathsep) if key)
        return cls(execution.cuda, execution.graphs, keys, execution.dla_core)


def engine_host(api: TrtApi, cuda: Cuda) -> EngineHost:
    """What engines that are built on this machine are tied to."""
    device = cuda.device()
    return EngineHost(
        flavour=api.flavour,
        version=api.version,
        gpu=device.name,
        compute_capabilities=(device.compute_capability,),
        # Where /proc does not tell (WSL), the CUDA version of the driver stands for it.
        driver=fingerprint().driver or f"CUDA {device.driver}",
        platform=current_platform(),
    )


def open_engine(path: Path, flavour: Flavour, options: TensorrtOptions | None = None) -> TensorrtSession:
    """Loads an engine that was built on this machine, or signed by somebody trusted.

    Args:
        path: The engine; its provenance and its seal lie beside it.
        flavour: Which TensorRT.
        options: How it is executed; None takes the defaults and the keys of $EDGEPOSE_TRUSTED_KEYS.

    Raises:
        MissingDependency: TensorRT is not installed.
        BackendUnavailable: TensorRT, CUDA, a driver or a GPU does not work, or the version is too old.
        ForeignEngine: The engine is for another machine; names the field and the command that builds it anew.
        IntegrityError: Nothing proves where the engine comes from, or it was changed.
        BadInput: The engine cannot be read, or has inputs or outputs that this session cannot feed.
        EnvironmentFault: TensorRT refuses it; the text is from TensorRT's log.
    """
    options = options or TensorrtOptions.of(TensorrtExecution())
    try:
        api = import_trt(flavour)
    except (ImportError, OSError, RuntimeError) as err:
        raise missing_fault(flavour, f"running {path}", err) from err
    cuda = open_cuda(options.cuda) if isinstance(options.cuda, str) else options.cuda
    plan, provenance = trusted_plan(path, engine_host(api, cuda), options.trusted_keys)
    loaded = _load(api, path, plan, options.dla_core if provenance.dla else None, _weights(path, provenance))
    return TensorrtSession(loaded, cuda, graphs=options.graphs)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedEngine:
    """A deserialised engine, which any number of sessions share.

    Attributes:
        path: Its file.
        api: The TensorRT that loaded it.
        log: What TensorRT said lately of what went wrong.
        runtime: TensorRT's runtime, which has to live as long as the engine.
        engine: TensorRT's engine.
        inputs: Its inputs.
        outputs: Its outputs.
        profiles: Its optimisation profiles.
    """

    path: Path
    api: TrtApi
    log: deque[str]
    runtime: Any
    engine: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]

    def fault(self, what: str) -> EnvironmentFault:
        """The error for what TensorRT did not do."""
        return _fault(self.path, self.api, what, self.log)


def _weights(path: Path, provenance: Provenance) -> bytes | None:
    """The ONNX file that a stripped engine takes its weights from; None where the engine has them.

    Raises:
        BadInput: It is missing.
        IntegrityError: It is not the one that the engine was built from.
    """
    if not provenance.stripped:
        return None
    file = path.with_name(STRIPPED_WEIGHTS)
    fix = rebuild_command(path, provenance.target)
    try:
        content = file.read_bytes()
    except OSError as err:
        found = err.strerror or str(err)
        raise BadInput(f"engine {path}: {file.name}", found=found, expected="the engine's weights", fix=fix) from err
    if digest_of(content) != provenance.source:
        found, expected = f"sha256 {digest_of(content)[:12]}…", f"{provenance.source[:12]}…"
        raise IntegrityError(f"engine {path}: {file.name}", found=found, expected=expected, fix=fix)
    return content


def _load(api: TrtApi, path: Path, plan: bytes, dla_core: int | None, weights: bytes | None) -> LoadedEngine:
    """Deserialises the bytes of an engine that were proven to be trusted, and puts its weights back if it has none."""
    trt = api.module
    log: deque[str] = deque(maxlen=8)
    try:
        logger = _logger(trt, log)
        runtime = trt.Runtime(logger)
        if dla_core is not None:
            if not 0 <= dla_core < runtime.num_DLA_cores:
                found = f"DLA core {dla_core} of {runtime.num_DLA_cores}"
                raise BackendUnavailable(f"running {path}", found=found, expected="a DLA core that this device has")
            runtime.DLA_core = dla_core
        engine = runtime.deserialize_cuda_engine(plan)
    except (RuntimeError, TypeError) as err:  # TypeError: pybind11's "factory function returned nullptr"
        raise _fault(path, api, f"cannot be started ({err})", log) from err
    if engine is None:
        raise _fault(path, api, "refuses the engine", log)
    if weights is not None:
        refitter = trt.Refitter(engine, logger)
        parser_refitter = trt.OnnxParserRefitter(refitter, logger)
        if not parser_refitter.refit_from_bytes(weights) or not refitter.refit_cuda_engine():
            raise _fault(path, api, "does not take the weights", log)
    inputs, outputs = _tensors(api, path, engine)
    return LoadedEngine(path, api, log, runtime, engine, inputs, outputs, _profiles(engine, inputs))


def _logger(trt: Any, log: deque[str]) -> Any:
    """TensorRT's logger; it keeps what went wrong instead of printing it."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                log.append(message)

    return Log()


def _fault(path: Path, api: TrtApi, what: str, log: Iterable[str]) -> EnvironmentFault:
    said = "; ".join(log) or "nothing in its log"
    return EnvironmentFault(f"engine {path}", found=f"{api.flavour} {api.version} {what}: {said}")


def _tensors(api: TrtApi, path: Path, engine: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an engine.

    Raises:
        SpecError: One of them is no plain array in device memory.
    """
    trt = api.module
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        where = f"engine {path}: {name}"
        fix = "build the engine without setting formats or types of its inputs and outputs"
        if engine.is_shape_inference_io(name):
            raise SpecError(where, found="a tensor of shapes", expected="data", fix="export the network without it")
        if engine.get_tensor_format(name) != trt.TensorFormat.LINEAR:
            found = engine.get_tensor_format_desc(name)
            raise SpecError(where, found=f"the layout {found}", expected="row-major linear", fix=fix)
        dtype = engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise SpecError(where, found=f"type {dtype}", expected=f"one of {', '.join(_DTYPES.values())}", fix=fix)
        shape = tuple(
            int(size) if size >= 0 else ("batch" if axis == 0 else f"dim{axis}")
            for axis, size in enumerate(engine.get_tensor_shape(name))
        )
        spec = TensorSpec(name, shape, _DTYPES[dtype])
        (inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs).append(spec)
    return tuple(inputs), tuple(outputs)


def _profiles(engine: Any, inputs: tuple[TensorSpec, ...]) -> tuple[Profile, ...]:
    found = []
    for index in range(max(1, engine.num_optimization_profiles)):  # a network of fixed shapes may have none
        profile: Profile = {}
        for spec in inputs:
            if any(isinstance(size, str) for size in spec.shape):
                smallest, best, largest = (tuple(dims) for dims in engine.get_tensor_profile_shape(spec.name, index))
                profile[spec.name] = (smallest, best, largest)
        found.append(profile)
    return tuple(found)


def choose_profile(profiles: tuple[Profile, ...], shapes: Mapping[str, Shape]) -> int:
    """The profile that takes these shapes and was made for the nearest number of elements; the first of several.

    Raises:
        SpecError: None takes them; names the input at fault.
    """
    fits = [
        (sum(abs(int(np.prod(best)) - int(np.prod(shapes[name]))) for name, (_, best, _) in ranges.items()), index)
        for index, ranges in enumerate(profiles)
        if all(_within(shapes[name], low, high) for name, (low, _, high) in ranges.items())
    ]
    if fits:
        return min(fits)[1]
    taken = {name: [(r[name][0], r[name][2]) for r in profiles if name in r] for name in shapes}
    bad = [name for name, spans in taken.items() if not any(_within(shapes[name], *span) for span in spans)]
    name = (bad or list(shapes))[0]
    expected = " or ".join(f"{low} to {high}" for low, high in taken[name]) or "no shape at all"
    fix = "feed it in parts, or build the engine for a larger max_batch"
    raise SpecError(f"feeds: {name}", found=f"shape {shapes[name]}", expected=expected, fix=fix)


def _within(shape: Shape, low: Shape, high: Shape) -> bool:
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


@dataclass(slots=True, eq=False)
class _Buffer:
    """Pinned and device memory of one tensor; grows, and never shrinks before it is freed.

    Attributes:
        cuda: Where the memory comes from.
        dtype: Of the tensor.
        device: Address on the device; 0 for none.
        pinned: Address in pinned memory; 0 for none.
        capacity_bytes: Size of both.
        view: The pinned memory as an array of the present shape.
    """

    cuda: Cuda
    dtype: np.dtype[Any]
    device: int = 0
    pinned: int = 0
    capacity_bytes: int = 0
    view: Array = field(default_factory=lambda: np.empty(0))

    def resize(self, shape: Shape) -> None:
        size_bytes = max(1, int(np.prod(shape)) * self.dtype.itemsize)
        if size_bytes > self.capacity_bytes:
            self.free()
            self.pinned = self.cuda.malloc_pinned(size_bytes)
            self.device = self.cuda.malloc(size_bytes)
            self.capacity_bytes = size_bytes
        raw = np.ctypeslib.as_array((ctypes.c_ubyte * self.capacity_bytes).from_address(self.pinned))
        self.view = raw[: int(np.prod(shape)) * self.dtype.itemsize].view(self.dtype).reshape(shape)

    def free(self) -> None:
        self.view, self.capacity_bytes = np.empty(0), 0
        device, self.device = self.device, 0
        pinned, self.pinned = self.pinned, 0
        try:
            if device:
                self.cuda.free(device)
        finally:
            if pinned:
                self.cuda.free_pinned(pinned)


class TensorrtSession:
    """An execution context of an engine, with a stream, memory and a CUDA graph of its own.

    Args:
        loaded: The engine.
        cuda: Who calls CUDA.
        graphs: Whether CUDA graphs are used.

    Attributes:
        plain_because: Why work is enqueued anew each time although graphs are asked for; empty where it is not.

    Raises:
        CudaError: No memory or stream is to be had.
        EnvironmentFault: TensorRT makes no execution context.
    """

    def __init__(self, loaded: LoadedEngine, cuda: Cuda, *, graphs: bool = True) -> None:
        self.inputs, self.outputs = loaded.inputs, loaded.outputs
        self.plain_because = "" if cuda.captures or not graphs else f"{cuda.name} captures no graphs"
        self._loaded, self._cuda, self._graphs_wanted = loaded, cuda, graphs
        self._shapes: tuple[Shape, ...] | None = None  # what context, buffers and graph are ready for
        self._profile = 0
        self._warm = False
        self._graph = 0
        self._buffers: dict[str, _Buffer] = {}
        self._context: Any = None
        self._given_back = ExitStack()
        try:
            self._stream = cuda.create_stream()
            self._given_back.callback(cuda.destroy_stream, self._stream)
            self._given_back.callback(self._drop_context)
            self._context, self._captures = self._new_context()
            for spec in (*self.inputs, *self.outputs):
                self._buffers[spec.name] = buffer = _Buffer(cuda, np.dtype(spec.dtype))
                self._given_back.callback(buffer.free)
            self._given_back.callback(self._drop_graph)
        except BaseException:
            with suppress(CudaError):
                self.close()
            raise

    def worker(self) -> TensorrtSession:
        """Another session over the same engine, for another thread: an execution context serves one at a time."""
        if self._context is None:
            raise ClosedSession
        return TensorrtSession(self._loaded, self._cuda, graphs=self._graphs_wanted)

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.infer`.

        Raises:
            SpecError: The feeds do not fit the engine, or none of its profiles.
            CudaError: A CUDA call failed.
            EnvironmentFault: TensorRT did not do what it was asked to.
        """
        if self._context is None:
            raise ClosedSession
        checked = check_feeds(feeds, self.inputs)
        shapes = tuple(checked[spec.name].shape for spec in self.inputs)
        if shapes != self._shapes:
            self._prepare(shapes)
        for name, value in checked.items():
            np.copyto(self._buffers[name].view, value)
        if self._graph or (self._warm and self._captures and self._captured()):
            self._cuda.launch(self._graph, self._stream)
        else:
            self._enqueue()
        self._cuda.synchronize(self._stream)
        self._warm = True
        return {spec.name: self._buffers[spec.name].view.copy() for spec in self.outputs}

    def close(self) -> None:
        """See `Session.close`; where CUDA fails on the way, the rest is given back first."""
        if self._context is not None:
            with suppress(CudaError):
                self._cuda.synchronize(self._stream)  # an interrupted inference may still be running
        self._given_back.close()

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be going down
            self.close()

    def _new_context(self) -> tuple[Any, bool]:
        """An execution context, and whether this session captures graphs of it."""
        api, engine = self._loaded.api, self._loaded.engine
        captures = self._graphs_wanted and self._cuda.captures
        try:
            if self._graphs_wanted and api.has("IRuntimeConfig.cuda_graph_strategy"):
                api.require("ICudaEngine.create_runtime_config")
                runtime_config = engine.create_runtime_config()
                runtime_config.cuda_graph_strategy = api.value("CudaGraphStrategy.WHOLE_GRAPH_CAPTURE")
                context, captures = engine.create_execution_context(runtime_config=runtime_config), False
            else:
                context = engine.create_execution_context()
        except (RuntimeError, TypeError) as err:
            raise self._loaded.fault(f"makes no execution context ({err})") from err
        if context is None:
            raise self._loaded.fault("makes no execution context")
        return context, captures

    def _prepare(self, shapes: tuple[Shape, ...]) -> None:
        """Makes context and buffers ready for other shapes; until it ends, they are ready for none."""
        named = {spec.name: shape for spec, shape in zip(self.inputs, shapes, strict=True)}
        profile = choose_profile(self._loaded.profiles, named)  # before anything is changed
        self._shapes, self._warm = None, False
        self._cuda.synchronize(self._stream)  # of an interrupted inference, before its memory goes
        self._drop_graph()
        context = self._context
        if profile != self._profile:
            self._done(context.set_optimization_profile_async(profile, self._stream), f"takes no profile {profile}")
            self._cuda.synchronize(self._stream)
            self._profile = profile
        for name, shape in named.items():
            self._done(context.set_input_shape(name, shape), f"takes no {name} of shape {shape}")
        try:
            unknown = context.infer_shapes()
        except RuntimeError as err:
            raise self._loaded.fault(f"cannot infer the outputs' shapes ({err})") from err
        self._done(not unknown, f"does not know the shapes of {', '.join(unknown)}")
        for spec in self.outputs:
            named[spec.name] = tuple(context.get_tensor_shape(spec.name))
            if min(named[spec.name], default=1) < 0:
                fix = "export the network with a fixed number of candidates"
                found = f"shape {named[spec.name]}, which depends on the data"
                raise SpecError(f"engine {self._loaded.path}: {spec.name}", found=found, expected="a shape", fix=fix)
        self._resize(named)
        for name in named:
            self._done(context.set_tensor_address(name, self._buffers[name].device), f"takes no address of {name}")
        self._shapes = shapes

    def _resize(self, shapes: Mapping[str, Shape]) -> None:
        """Makes room for these shapes; where there is not enough, what was taken is given back for smaller ones."""
        try:
            for name, shape in shapes.items():
                self._buffers[name].resize(shape)
        except CudaError:
            for buffer in self._buffers.values():
                with suppress(CudaError):
                    buffer.free()
            raise

    def _enqueue(self) -> None:
        """Input copies, network, output copies: on the stream, now or into the graph that is being captured."""
        for spec in self.inputs:
            buffer = self._buffers[spec.name]
            self._cuda.copy_to_device(buffer.device, buffer.pinned, buffer.view.nbytes, self._stream)
        self._done(self._context.execute_async_v3(self._stream), "does not execute the engine")
        for spec in self.outputs:
            buffer = self._buffers[spec.name]
            self._cuda.copy_to_host(buffer.pinned, buffer.device, buffer.view.nbytes, self._stream)

    def _captured(self) -> bool:
        """Captures the graph; False, for good, where this engine cannot be captured."""
        try:
            self._graph = self._cuda.capture(self._stream, self._enqueue)
        except EnvironmentFault as err:
            if isinstance(err, CudaError) and not err.of_capture:
                raise  # the device is at fault, and plain work would fail as well
            self.plain_because, self._captures = str(err), False
            return False
        return True

    def _done(self, success: bool, what: str) -> None:
        if not success:
            raise self._loaded.fault(what)

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, 0
        if graph:
            self._cuda.destroy_graph(graph)

    def _drop_context(self) -> None:
        """Lets TensorRT free the context; the engine goes with its last session."""
        self._context = self._shapes = None
        del self._loaded
