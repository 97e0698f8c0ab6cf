"""ONNX → TensorRT engine: built on the device by TensorRT, or compiled ahead of time by TensorRT-RTX without a GPU.

Invariant: networks are strongly typed, so precision is what the ONNX file says, in TensorRT 10 as in 11; no flag of the
builder changes it. What only some versions have is asked of the table (`TrtApi`), and nothing is tried to see whether
it fails.

What has run: TensorRT-RTX 1.7 compiled every network of the zoo here, without a GPU. TensorRT proper has not been run
on a device: its calls are held against the recorded interfaces of 10.3 to 11.4 and run over a builder made of Python
(tests/runtime/fake_tensorrt.py).
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from edgepose.errors import BackendUnavailable, EdgeposeError, EnvironmentFault, OnnxError, UsageError
from edgepose.export.sparsity import sparse_weights
from edgepose.export.trt_kernels import EngineKernel, kernels_in_inspection, kernels_in_log
from edgepose.export.trt_memory import Attempt, Profile, attempts, needs_of
from edgepose.export.trt_progress import Phases, Told
from edgepose.host import cache_directory
from edgepose.runtime.cuda import Cuda, open_cuda
from edgepose.runtime.provenance import EngineHost
from edgepose.runtime.tensorrt import engine_host
from edgepose.runtime.trt_diagnosis import missing_fault
from edgepose.runtime.trt_versions import Flavour, TrtApi, import_trt
from edgepose.spec import CudaChoice, Target, TensorrtBuild
from edgepose.storage import atomic_write

CAPABILITIES = {
    "7.5": "ComputeCapability.SM75",
    "8.0": "ComputeCapability.SM80",
    "8.6": "ComputeCapability.SM86",
    "8.9": "ComputeCapability.SM89",
    "12.0": "ComputeCapability.SM120",
    "12.1": "ComputeCapability.SM121",
}
"""What TensorRT-RTX compiles for, as `CONDITIONAL` calls it."""
_NO_GPU = ("cudaError 35", "cudaError 100")
"""In lines that TensorRT-RTX logs wherever there is no driver or no GPU, and that mean nothing else."""
_NO_MEMORY = re.compile(r"out ?of ?memory|cudaErrorMemoryAllocation|could not be allocated|failed to allocate", re.I)
_FULLY_TYPED_FROM = (10, 12)


@dataclass(frozen=True, slots=True)
class PlanOrder:
    """What to build.

    Attributes:
        model: The ONNX file, which has passed the lint; weights may lie beside it.
        target: The device; how to build is its `tensorrt`.
        flavour: Who builds.
        told: Called with the builder's phase, how much is done and how much there is.
        cuda: Who calls CUDA; a `Cuda` of one's own will do.
    """

    model: Path
    target: Target
    flavour: Flavour
    told: Told = lambda _what, _done, _whole: None
    cuda: CudaChoice | Cuda = "auto"

    @property
    def build(self) -> TensorrtBuild:
        return self.target.tensorrt

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities of the target."""
        return tuple(part.strip() for part in self.target.compute_capability.split(",") if part.strip())

    @property
    def where(self) -> str:
        return f"target {self.target.name}: {self.flavour}"


class DlaReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a DLA core takes of a network.

    Attributes:
        core: The core.
        layers: Layers that it takes.
        fallen_back: Kind and name of those that run on the GPU instead.
    """

    core: int
    layers: int
    fallen_back: tuple[str, ...]


class PlanReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an engine was built.

    Attributes:
        builder: "tensorrt 10.16.1.11".
        capabilities: Compute capabilities that it runs on.
        size_bytes: Of the engine.
        profiles: Smallest, best and largest batch of each optimisation profile; empty for a fixed batch.
        level: The builder's optimisation level.
        workspace_bytes: Limit of a kernel's own memory; 0 is TensorRT's own.
        estimate_bytes: Memory that building was expected to take.
        without: What was given up for want of memory, compared with what the target asks for.
        options: Further options that were set.
        timing_cache: "found", "new" or "none".
        warnings: What the builder warned of.
        dla: What the DLA core takes; None without one.
    """

    builder: str
    capabilities: tuple[str, ...]
    size_bytes: int
    profiles: tuple[Profile, ...]
    level: int
    workspace_bytes: int
    estimate_bytes: int
    without: tuple[str, ...]
    options: tuple[str, ...]
    timing_cache: str
    warnings: tuple[str, ...]
    dla: DlaReport | None


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """An engine that was built.

    Attributes:
        content: Its bytes.
        host: What it is tied to.
        report: How it was built.
        kernels: What it consists of.
        source: Where the kernels are known from: "inspector" or "log".
    """

    content: bytes
    host: EngineHost
    report: PlanReport
    kernels: tuple[EngineKernel, ...]
    source: str


def build_plan(order: PlanOrder) -> Plan:
    """Builds an engine.

    Raises:
        MissingDependency: TensorRT is not installed.
        BackendUnavailable: TensorRT does not work here, is too old, or this is not the target's GPU.
        UsageError: The target asks for what this TensorRT does not have.
        OnnxError: The parser refuses the file; names the node.
        EnvironmentFault: The builder fails, or there is not memory enough; the text is from its log.
    """
    try:
        api = import_trt(order.flavour)
    except (ImportError, OSError, RuntimeError) as err:
        raise missing_fault(order.flavour, f"building for {order.target.name}", err) from err
    host, free_bytes = _host(api, order)
    needs = needs_of(order.model)
    max_batch = order.target.max_batch
    plan, without = None, ""
    for attempt in attempts(_asked(order), max_batch, needs, free_bytes):
        work = _Work(api, order, host, attempt, max(needs.build_bytes(profile[2]) for profile in attempt.profiles))
        plan = _attempted(work)
        if plan is not None or not work.log.is_out_of_memory:
            break
        without = "; ".join(attempt.without)
    if plan is None:
        raise _build_fault(api, order, work.log, without)
    return plan


def _asked(order: PlanOrder) -> TensorrtBuild:
    """The target's settings; with a DLA core, or a fixed batch, every profile has one batch only."""
    build = order.build
    if order.target.batch:
        return msgspec.structs.replace(build, profiles=((order.target.batch,) * 3,))
    if build.dla_core is not None:
        return msgspec.structs.replace(build, profiles=tuple((best, best, best) for _, best, _ in build.profiles))
    for low, best, high in build.profiles:
        if not low <= best <= high:
            found, expected = f"{low}, {best}, {high}", "smallest, best, largest"
            raise UsageError(f"target {order.target.name}: tensorrt: profiles", found=found, expected=expected)
    return build


def _host(api: TrtApi, order: PlanOrder) -> tuple[EngineHost, int]:
    """What the engine is tied to, and how much memory is free (0 where that does not matter)."""
    if api.flavour == "tensorrt-rtx":
        _check_ahead_of_time(order)
        return EngineHost(api.flavour, api.version, "", order.capabilities, "", ""), 0
    cuda = open_cuda(order.cuda) if isinstance(order.cuda, str) else order.cuda
    device = cuda.device()
    if order.capabilities and device.compute_capability not in order.capabilities:
        raise BackendUnavailable(
            order.where, found=f"{device.name}, of compute capability {device.compute_capability}",
            expected=" or ".join(order.capabilities), fix="build on the device itself",
        )  # fmt: skip
    return engine_host(api, cuda), device.free_bytes


def _check_ahead_of_time(order: PlanOrder) -> None:
    build = order.build
    unknown = [name for name in order.capabilities if name not in CAPABILITIES]
    if unknown or not order.capabilities:
        found = f"compute capability {unknown[0] if unknown else '(none)'}"
        raise UsageError(order.where, found=found, expected=f"some of {', '.join(CAPABILITIES)}")
    asked = {
        "version_compatible": build.version_compatible,
        "strip_weights": build.strip_weights,
        "dla_core": build.dla_core is not None,
        "hardware": build.hardware != "none",
    }
    for name in (name for name, wanted in asked.items() if wanted):
        fix = "leave it out, or name compute capabilities" if name == "hardware" else "leave it out"
        raise UsageError(f"{order.where}: {name}", found="an option that it does not have", expected="none", fix=fix)


# ---------------------------------------------------------------------------------------------------------- one attempt


@dataclass(slots=True)
class _Log:
    """What a builder said."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    @property
    def is_out_of_memory(self) -> bool:
        return any(_NO_MEMORY.search(line) for line in self.errors)


@dataclass(slots=True, eq=False)
class _Work:
    """One attempt on its way."""

    api: TrtApi
    order: PlanOrder
    host: EngineHost
    attempt: Attempt
    estimate_bytes: int
    log: _Log = field(default_factory=_Log)
    options: list[str] = field(default_factory=list)


def _attempted(work: _Work) -> Plan | None:
    """Builds once; None where the builder does not, which its log explains."""
    trt = work.api.module
    logger = _logger(trt, work.log)
    try:
        builder = trt.Builder(logger)
    except (RuntimeError, TypeError) as err:  # TypeError: pybind11's "factory function returned nullptr"
        raise missing_fault(work.order.flavour, f"building for {work.order.target.name}", err) from err
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(work.order.model)):
        raise _parse_fault(work.order, parser, work.log)
    builder_config = builder.create_builder_config()
    _configure(work, builder_config)
    profiles = _add_profiles(work, builder, network, builder_config)
    dla = _use_dla(work, builder, network, builder_config)
    cache, cache_state = _use_timing_cache(work, builder_config)
    phases = Phases(work.order.told)
    monitor = _monitor(trt, phases)  # TensorRT does not keep it alive
    builder_config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, builder_config)
    phases.raise_fault()
    if plan is None:
        return None
    content = bytes(plan)
    if cache is not None:
        _store_timing_cache(builder_config, cache)
    kernels, source = _kernels(work, logger, content)
    report = PlanReport(
        builder=f"{work.api.flavour} {work.api.version}", capabilities=work.host.compute_capabilities,
        size_bytes=len(content), profiles=profiles, level=work.attempt.level,
        workspace_bytes=work.attempt.workspace_bytes, estimate_bytes=work.estimate_bytes,
        without=work.attempt.without, options=tuple(work.options), timing_cache=cache_state,
        warnings=tuple(dict.fromkeys(work.log.warnings)), dla=dla,
    )  # fmt: skip
    return Plan(content, work.host, report, kernels, source)


def _logger(trt: Any, log: _Log) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if any(line in message for line in _NO_GPU):
                return
            if int(severity) <= int(trt.ILogger.ERROR):
                log.errors.append(message)
            elif int(severity) == int(trt.ILogger.WARNING):
                log.warnings.append(message)
            elif "LayerType: " in message:
                log.layers.append(message)

    return Logger()


def _monitor(trt: Any, phases: Phases) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def _configure(work: _Work, builder_config: Any) -> None:
    """Everything but profiles, DLA and timing cache."""
    api, trt, build = work.api, work.api.module, work.order.build
    builder_config.builder_optimization_level = work.attempt.level
    builder_config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    builder_config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and ten bits are not FP32
    if work.attempt.workspace_bytes:
        builder_config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, work.attempt.workspace_bytes)
    if build.version_compatible:
        builder_config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # Else the engine carries a runtime as native code, which sessions would have to allow.
        builder_config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
        work.options.append("version-compatible")
    if sparse := sparse_weights(work.order.model):  # the builder may then choose kernels that skip the zeros
        builder_config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        work.options.append(f"2:4 sparse weights in {len(sparse)} layers")
    if build.strip_weights:
        builder_config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        builder_config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
        work.options.append("weights stripped")
    if build.hardware == "ampere-plus":
        builder_config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif build.hardware == "same-compute-capability":
        level = api.value("HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY")
        builder_config.hardware_compatibility_level = level
    if build.hardware != "none":
        work.options.append(build.hardware)
    if api.flavour == "tensorrt-rtx":
        _set_capabilities(work, builder_config)


def _set_capabilities(work: _Work, builder_config: Any) -> None:
    api, wanted = work.api, work.order.capabilities
    api.require("IBuilderConfig.num_compute_capabilities")
    api.require("IBuilderConfig.set_compute_capability")
    builder_config.num_compute_capabilities = len(wanted)
    for index, name in enumerate(wanted):
        if not builder_config.set_compute_capability(api.value(CAPABILITIES[name]), index):
            found = f"compute capability {name}, which {api.flavour} {api.version} refuses"
            raise BackendUnavailable(work.order.where, found=found, expected="one that it compiles for")


def _add_profiles(work: _Work, builder: Any, network: Any, builder_config: Any) -> tuple[Profile, ...]:
    """The optimisation profiles of a network whose batch is free; none for one of fixed shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes[tensor.name] = tuple(tensor.shape)
    for name, shape in shapes.items():
        if any(size < 0 for size in shape[1:]):
            raise OnnxError(
                f"{work.order.model}: {name}", found=f"shape {shape}, free beyond the batch",
                expected="a fixed height and width", fix="export the network with a fixed input size",
            )  # fmt: skip
    free = {name: shape[1:] for name, shape in shapes.items() if shape and shape[0] < 0}
    if not free:
        return ()
    for low, best, high in work.attempt.profiles:
        profile = builder.create_optimization_profile()
        for name, rest in free.items():
            profile.set_shape(name, (low, *rest), (best, *rest), (high, *rest))
        if builder_config.add_optimization_profile(profile) < 0:
            raise _build_fault(work.api, work.order, work.log, f"profile {low}, {best}, {high}")
    return work.attempt.profiles


def _use_dla(work: _Work, builder: Any, network: Any, builder_config: Any) -> DlaReport | None:
    """Gives layers to the DLA core that the target names, and counts those that fall back to the GPU."""
    trt, core = work.api.module, work.order.build.dla_core
    if core is None:
        return None
    if core >= builder.num_DLA_cores:
        raise BackendUnavailable(
            f"{work.order.where}: dla_core {core}", found=f"{builder.num_DLA_cores} DLA cores",
            expected="a core that this device and this TensorRT have", fix="leave dla_core out",
        )  # fmt: skip
    builder_config.default_device_type = trt.DeviceType.DLA
    builder_config.DLA_core = core
    builder_config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    fallen = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if not builder_config.can_run_on_DLA(layer):
            fallen.append(f"{layer.type.name.lower()} {layer.name}")
    work.options.append(f"DLA core {core}")
    return DlaReport(core, network.num_layers - len(fallen), tuple(fallen))


# --------------------------------------------------------------------------------------------------------- timing cache


def _use_timing_cache(work: _Work, builder_config: Any) -> tuple[Path | None, str]:
    """Gives the builder what it measured before, on this device with this version; TensorRT-RTX measures nothing."""
    if work.api.flavour == "tensorrt-rtx":
        return None, "none"
    file = timing_cache_file(work.host)
    stored = b""
    with suppress(OSError):
        stored = file.read_bytes()
    timing_cache = builder_config.create_timing_cache(stored)
    if stored and builder_config.set_timing_cache(timing_cache, ignore_mismatch=False):
        return file, "found"
    timing_cache = builder_config.create_timing_cache(b"")
    builder_config.set_timing_cache(timing_cache, ignore_mismatch=False)
    return file, "new"


def _store_timing_cache(builder_config: Any, file: Path) -> None:
    timing_cache = builder_config.get_timing_cache()
    if timing_cache is not None:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write(file, bytes(timing_cache.serialize()))


def timing_cache_file(host: EngineHost) -> Path:
    """Where what a builder measured on a device is kept; another device, driver or version has another file."""
    parts = (host.flavour, host.version, host.gpu, *host.compute_capabilities, host.driver, host.platform)
    name = "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", part) for part in parts)
    return cache_directory() / "timing" / f"{name}.cache"


# -------------------------------------------------------------------------------------------------------------- results


def _kernels(work: _Work, logger: Any, content: bytes) -> tuple[tuple[EngineKernel, ...], str]:
    """What the engine consists of: asked of itself where it can be loaded, else from the builder's log."""
    trt = work.api.module
    if work.api.flavour == "tensorrt-rtx":
        return kernels_in_log(work.log.layers), "log"
    runtime = trt.Runtime(logger)
    if work.order.build.dla_core is not None:
        runtime.DLA_core = work.order.build.dla_core
    engine = runtime.deserialize_cuda_engine(content)  # these very bytes were built here, a moment ago
    if engine is None:
        raise _build_fault(work.api, work.order, work.log, "loading it")
    inspector = engine.create_engine_inspector()
    return kernels_in_inspection(inspector.get_engine_information(trt.LayerInformationFormat.JSON)), "inspector"


def _parse_fault(order: PlanOrder, parser: Any, log: _Log) -> EdgeposeError:
    """The first thing that the parser refuses, by node."""
    if not parser.num_errors:
        said = "; ".join(log.errors) or "nothing in its log"
        return OnnxError(str(order.model), found=f"{order.flavour} does not parse it: {said}")
    onnx_error = parser.get_error(0)
    node = onnx_error.node_name() or f"node {onnx_error.node()}"
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    return OnnxError(
        f"{order.model}: {node}",
        found=f"{onnx_error.node_operator() or 'an operator'} that {order.flavour} refuses: {onnx_error.desc()}{more}",
        expected="what its parser takes",
    )


def _build_fault(api: TrtApi, order: PlanOrder, log: _Log, without: str) -> EnvironmentFault:
    said = "; ".join(dict.fromkeys(log.errors)) or "nothing in its log"
    fix = ""
    if "Turing" in said and "FP32" in said:
        fix = "compile for 8.0 and newer only, or a float network with floats: fp16"
    elif log.is_out_of_memory:
        given_up = f" even with {without}" if without else ""
        fix = f"free memory, or ask for a smaller max_batch: there is not enough{given_up}"
    elif "workspace" in said:
        fix = f"raise workspace_mib of the target (now {order.build.workspace_mib})"
    elif api.flavour == "tensorrt" and _number(api.version) < _FULLY_TYPED_FROM:
        fix = "strongly typed networks are complete from TensorRT 10.12 on only: update it, or build with floats: fp32"
    return EnvironmentFault(order.where, found=f"version {api.version} builds no engine: {said}", fix=fix)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
