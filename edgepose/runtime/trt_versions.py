"""What exists in which TensorRT: one table, and the one way to reach what does not exist in all of them.

Invariant: nobody asks an object whether it has an attribute. What every supported version has is written plainly; what
only some have stands in `CONDITIONAL` and is reached through `TrtApi`, which knows from the version what is there. Both
are held against the recorded interfaces (tests/golden/tensorrt_api.json) by tests/runtime/test_trt_versions.py, for
every module that uses `import_trt` or `TrtApi`; there, `trt` is TensorRT's module, and `runtime`, `engine`, `context`,
`runtime_config`, `builder`, `network`, `parser`, `builder_config`, `profile`, `timing_cache`, `inspector`, `layer`,
`tensor`, `onnx_error`, `refitter` and `parser_refitter` (with or without an underscore before) are always its objects,
by which the test knows what is touched.

The interfaces are those of NVIDIA's own Python bindings of TensorRT 10.3, 10.7, 10.13, 10.16, 11.0 and 11.4 and of
TensorRT-RTX 1.7. What is first seen in 10.13 may be a little older; the table says 10.13, to be on the safe side.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

from edgepose.errors import BackendUnavailable

Flavour = Literal["tensorrt", "tensorrt-rtx"]
"""TensorRT proper (Jetson, data centre, desktop) or TensorRT-RTX (desktop): different products, different engines."""

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
OLDEST: dict[Flavour, tuple[int, int]] = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 7)}
"""The oldest versions supported: TensorRT as in JetPack 6, TensorRT-RTX as recorded."""

_Version = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Span:
    """Where something exists.

    Attributes:
        since: First version of TensorRT that has it; None if none does.
        until: First version of TensorRT that has it no more; None if the newest still does.
        rtx: Whether TensorRT-RTX has it.
    """

    since: _Version | None = OLDEST["tensorrt"]
    until: _Version | None = None
    rtx: bool = True

    def holds(self, flavour: Flavour, version: _Version) -> bool:
        """Whether that version has it."""
        if flavour == "tensorrt-rtx":
            return self.rtx
        return self.since is not None and self.since <= version and (self.until is None or version < self.until)


_RTX_ONLY = Span(since=None)
_BEFORE_11 = Span(until=(11, 0), rtx=False)
_FROM_10_7 = Span(since=(10, 7))
_FROM_10_13 = Span(since=(10, 13))
_FROM_10_16 = Span(since=(10, 16))
_FROM_11_4 = Span(since=(11, 4))

CONDITIONAL: dict[str, Span] = {
    # Precision: a flag of the builder until 10.x, a property of the network's types since (strong typing).
    "BuilderFlag.FP16": _BEFORE_11,
    "BuilderFlag.BF16": _BEFORE_11,
    "BuilderFlag.INT8": _BEFORE_11,
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": _BEFORE_11,
    "Builder.platform_has_fast_fp16": _BEFORE_11,
    "Builder.platform_has_fast_int8": _BEFORE_11,
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": _BEFORE_11,
    # Building
    "Builder.build_serialized_network_to_stream": _FROM_10_13,
    "BuilderFlag.STRICT_NANS": _FROM_10_7,
    "BuilderFlag.MONITOR_MEMORY": _FROM_10_7,
    "BuilderFlag.DISTRIBUTIVE_INDEPENDENCE": _FROM_10_13,
    "BuilderFlag.EDITABLE_TIMING_CACHE": _FROM_10_13,
    "BuilderFlag.REQUIRE_USER_ALLOCATION": _RTX_ONLY,
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": _FROM_10_13,
    "IBuilderConfig.max_num_tactics": _FROM_10_7,
    "IBuilderConfig.tiling_optimization_level": _FROM_10_13,
    "IBuilderConfig.l2_limit_for_tiling": _FROM_10_13,
    "IBuilderConfig.build_route": _FROM_11_4,
    "IBuilderConfig.remote_auto_tuning_config": Span(since=(10, 13), rtx=False),
    "TilingOptimizationLevel": _FROM_10_13,
    "TilingOptimizationLevel.NONE": _FROM_10_13,
    "TilingOptimizationLevel.FAST": _FROM_10_13,
    "TilingOptimizationLevel.MODERATE": _FROM_10_13,
    "TilingOptimizationLevel.FULL": _FROM_10_13,
    "ITimingCache.queryKeys": _FROM_10_13,
    "ITimingCache.query": _FROM_10_13,
    "ITimingCache.update": _FROM_10_13,
    # Building ahead of time
    "ComputeCapability": _RTX_ONLY,
    "ComputeCapability.SM75": _RTX_ONLY,
    "ComputeCapability.SM80": _RTX_ONLY,
    "ComputeCapability.SM86": _RTX_ONLY,
    "ComputeCapability.SM89": _RTX_ONLY,
    "ComputeCapability.SM120": _RTX_ONLY,
    "ComputeCapability.SM121": _RTX_ONLY,
    "IBuilderConfig.num_compute_capabilities": _RTX_ONLY,
    "IBuilderConfig.set_compute_capability": _RTX_ONLY,
    "IBuilderConfig.get_compute_capability": _RTX_ONLY,
    # DLA
    "OnnxParserFlag.REPORT_CAPABILITY_DLA": _FROM_10_16,
    "OnnxParserFlag.ADJUST_FOR_DLA": _FROM_10_16,
    "OnnxParserFlag.ENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLA": _FROM_10_13,
    "DLAWorkspaceAllocationStrategy": _FROM_11_4,
    "DLAWorkspaceAllocationStrategy.SHARED_STATIC": _FROM_11_4,
    "Runtime.dla_workspace_allocation_strategy": _FROM_11_4,
    # Running
    "ICudaEngine.device_memory_size": _BEFORE_11,
    "ICudaEngine.create_runtime_config": _FROM_10_13,
    "ICudaEngine.get_engine_stat": _FROM_10_16,
    "IRuntimeConfig": _FROM_10_13,
    "IRuntimeConfig.cuda_graph_strategy": _RTX_ONLY,
    "CudaGraphStrategy": _RTX_ONLY,
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE": _RTX_ONLY,
    "IExecutionContext.is_stream_capturable": _RTX_ONLY,
    "Runtime.get_engine_validity": _RTX_ONLY,
}
"""What not every supported version has, by its dotted name: attribute of the module, or member of one."""


@dataclass(frozen=True, slots=True)
class TrtApi:
    """An imported TensorRT.

    Attributes:
        module: `tensorrt` or `tensorrt_rtx`.
        flavour: Which of them.
        version: As it says itself ("10.16.1.11").
    """

    module: Any
    flavour: Flavour
    version: str

    def has(self, name: str) -> bool:
        """Whether this version has what `CONDITIONAL` calls `name`; asking for another name is a mistake (KeyError)."""
        return CONDITIONAL[name].holds(self.flavour, _major_minor(self.version))

    def require(self, name: str) -> None:
        """Goes on only where `has` holds.

        Raises:
            BackendUnavailable: It does not.
        """
        if not self.has(name):
            found = f"{self.flavour} {self.version}, which has no {name}"
            raise BackendUnavailable(f"{self.flavour}: {name}", found=found, expected=_where(CONDITIONAL[name]))

    def value(self, name: str) -> Any:
        """What stands in the module under `name` ("BuilderFlag.STRICT_NANS").

        Raises:
            BackendUnavailable: This version does not have it.
        """
        self.require(name)
        found = self.module
        for part in name.split("."):
            found = getattr(found, part)
        return found


def import_trt(flavour: Flavour) -> TrtApi:
    """Imports TensorRT, the only place that does.

    Raises:
        ImportError: It is not installed, or its libraries are not.
        BackendUnavailable: It is older than what is supported.
    """
    module = import_module(flavour.replace("-", "_"))
    api = TrtApi(module, flavour, str(module.__version__))
    oldest = OLDEST[flavour]
    if _major_minor(api.version) < oldest:
        expected = f"{oldest[0]}.{oldest[1]} or newer"
        raise BackendUnavailable(flavour, found=f"version {api.version}", expected=expected, fix=f"update {flavour}")
    return api


def _major_minor(version: str) -> _Version:
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise BackendUnavailable("TensorRT", found=f"a version {version!r}", expected="numbers with dots")
    return int(match[1]), int(match[2])


def _where(span: Span) -> str:
    places = []
    if span.since is not None:
        until = "" if span.until is None else f" and before {span.until[0]}.{span.until[1]}"
        places.append(f"tensorrt from {span.since[0]}.{span.since[1]}{until}")
    if span.rtx:
        places.append("tensorrt-rtx")
    return " or ".join(places)
