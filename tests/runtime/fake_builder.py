"""The building half of the TensorRT made of Python: it parses real ONNX files, and is as strict as TensorRT is.

Invariant: objects have the attributes that the recorded interfaces have and no others (slots), so that a wrong name
fails; a network is what the ONNX file computes (found by ONNX's reference evaluator); what TensorRT refuses is False or
None and a line in the log.

The networks that it knows multiply `images` (batch, 2, 3) by a factor, however many nodes that takes.
"""

from __future__ import annotations

import types
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from tests.runtime.fake_tensorrt import FakeTensorrt, plan_of

UNKNOWN = "Mystery"
"""An operator that the parser refuses."""


class Bytes:
    """What TensorRT hands out for memory: not bytes, but something that gives them."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    @property
    def nbytes(self) -> int:
        return len(self._content)

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self._content)

    def __bytes__(self) -> bytes:
        return self._content


def give_builder(module: FakeTensorrt, *, most_batch: int = 1 << 20, dla_takes: tuple[str, ...] = ()) -> FakeTensorrt:
    """Adds what building takes.

    Args:
        module: The fake TensorRT.
        most_batch: Largest batch that there is memory for.
        dla_takes: Kinds of layers that a DLA core runs.
    """
    module.most_batch = most_batch  # type: ignore[attr-defined]
    module.dla_takes = dla_takes  # type: ignore[attr-defined]
    module.built = []  # type: ignore[attr-defined]
    module.NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})  # type: ignore[attr-defined]
    module.BuilderFlag = IntEnum(  # type: ignore[attr-defined]
        "BuilderFlag",
        {"GPU_FALLBACK": 3, "TF32": 6, "SPARSE_WEIGHTS": 7, "VERSION_COMPATIBLE": 12, "EXCLUDE_LEAN_RUNTIME": 13,
         "STRIP_PLAN": 18, "REFIT_IDENTICAL": 19},
    )  # fmt: skip
    module.MemoryPoolType = IntEnum("MemoryPoolType", {"WORKSPACE": 0})  # type: ignore[attr-defined]
    module.ProfilingVerbosity = IntEnum("ProfilingVerbosity", {"LAYER_NAMES_ONLY": 0, "DETAILED": 2})  # type: ignore[attr-defined]
    module.LayerInformationFormat = IntEnum("LayerInformationFormat", {"ONELINE": 0, "JSON": 1})  # type: ignore[attr-defined]
    module.DeviceType = IntEnum("DeviceType", {"GPU": 0, "DLA": 1})  # type: ignore[attr-defined]
    module.HardwareCompatibilityLevel = IntEnum(  # type: ignore[attr-defined]
        "HardwareCompatibilityLevel", {"NONE": 0, "AMPERE_PLUS": 1, "SAME_COMPUTE_CAPABILITY": 2}
    )
    module.LayerType = IntEnum("LayerType", {"CAST": 1, "MATRIX_MULTIPLY": 2, "ELEMENTWISE": 3})  # type: ignore[attr-defined]
    module.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})  # type: ignore[attr-defined]
    for kind in (_Builder, _Parser, _Refitter, _ParserRefitter):
        setattr(module, kind.name, _bound(kind, module))
    return module


def _bound(kind: Any, module: FakeTensorrt) -> Any:
    return lambda *args: kind(module, *args)


class _Builder:
    name = "Builder"
    __slots__ = ("_logger", "_module", "num_DLA_cores")

    def __init__(self, module: FakeTensorrt, logger: Any) -> None:
        if module.start_fault:
            logger.log(1, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._module, self._logger, self.num_DLA_cores = module, logger, module.dla_cores

    def create_network(self, flags: int = 0) -> _Network:
        assert flags == 1 << int(self._module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config(self._module)

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> Bytes | None:
        module: Any = self._module
        assert config.profiling_verbosity == module.ProfilingVerbosity.DETAILED, "the inspector would know names only"
        module.built.append(config)
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        if not (monitor.step_complete("Building engine", 0) and monitor.step_complete("Building engine", 1)):
            return None
        monitor.phase_finish("Building engine")
        largest = max((shapes["images"][2][0] for shapes in config.profiles), default=1)
        if largest > module.most_batch:
            self._logger.log(1, "Requested amount of GPU memory (1 byte) could not be allocated: out of memory")
            return None
        if network.batch < 0 and not config.profiles:
            self._logger.log(1, "Network has dynamic or shape inputs, but no optimization profile has been defined.")
            return None
        stripped = module.BuilderFlag.STRIP_PLAN in config.flags_set
        assert not stripped or module.BuilderFlag.REFIT_IDENTICAL in config.flags_set
        self._logger.log(2, "a warning of the builder")
        config.cache = Bytes(b"timings of " + module.__version__.encode())
        batches = [tuple(dims[0] for dims in shapes["images"]) for shapes in config.profiles] or None
        factors = dict.fromkeys(network.factors, 0.0) if stripped else network.factors
        return Bytes(plan_of(batches, factors=factors, layers=network.inspected))


class _Network:
    __slots__ = ("batch", "factors", "inspected", "layers")

    def __init__(self) -> None:
        self.batch, self.factors, self.inspected = -1, {}, []
        self.layers: list[Any] = []

    @property
    def num_inputs(self) -> int:
        return 1

    def get_input(self, index: int) -> Any:
        return types.SimpleNamespace(name="images", shape=(self.batch, 2, 3))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Any:
        return self.layers[index]


class _Parser:
    name = "OnnxParser"
    __slots__ = ("_errors", "_module", "_network")

    def __init__(self, module: FakeTensorrt, network: _Network, logger: Any) -> None:
        self._module, self._network, self._errors = module, network, []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def parse_from_file(self, path: str) -> bool:
        module: Any = self._module
        model = onnx.load(path)
        for place, node in enumerate(model.graph.node):
            if node.op_type == UNKNOWN:
                error = {
                    "node_name": node.name,
                    "node": place,
                    "node_operator": node.op_type,
                    "desc": "no such operator",
                }
                self._errors.append(types.SimpleNamespace(**{k: (lambda v=v: v) for k, v in error.items()}))
                return False
        network, (size, *axes) = self._network, model.graph.input[0].type.tensor_type.shape.dim
        network.batch = size.dim_value or -1
        ones = np.ones((size.dim_value or 1, *(axis.dim_value for axis in axes)), np.float32)
        answers = ReferenceEvaluator(model).run(None, {"images": ones})
        names = [value.name for value in model.graph.output]
        network.factors = {name: float(answer.reshape(-1)[0]) for name, answer in zip(names, answers, strict=True)}
        kinds = {"Cast": "CAST", "MatMul": "MATRIX_MULTIPLY"}
        halved = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
        words = {"Datatype": "Half"} if halved else {"Format/Datatype": "Row major linear FP32"}
        for node in model.graph.node:
            kind = module.LayerType[kinds.get(node.op_type, "ELEMENTWISE")]
            network.layers.append(types.SimpleNamespace(name=node.name, type=kind))
            network.inspected.append({
                "Name": f"{node.name}_myl0", "LayerType": "gemm" if node.op_type == "MatMul" else "kgen",
                "Inputs": [{"Name": "x", "Dimensions": [1], **words}], "Metadata": f"[ONNX Layer: {node.name}]",
            })  # fmt: skip
        return True


class _Profile:
    __slots__ = ("shapes",)

    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002 - TensorRT's names
        self.shapes[input] = (min, opt, max)


class _Config:
    __slots__ = (
        *("DLA_core", "_module", "builder_optimization_level", "cache", "capabilities", "default_device_type"),
        *("flags_set", "hardware_compatibility_level", "mismatches", "num_compute_capabilities", "pools", "profiles"),
        *("profiling_verbosity", "progress_monitor"),
    )

    def __init__(self, module: FakeTensorrt) -> None:
        self._module = module
        self.flags_set = {module.BuilderFlag.TF32}  # type: ignore[attr-defined]
        self.pools: dict[Any, int] = {}
        self.profiles: list[dict[str, Any]] = []
        self.capabilities: dict[int, Any] = {}
        self.mismatches: list[bool] = []
        self.cache: Any = None
        self.profiling_verbosity = self.default_device_type = self.DLA_core = self.hardware_compatibility_level = None
        self.builder_optimization_level, self.num_compute_capabilities = 3, 0

    def set_flag(self, flag: Any) -> None:
        self.flags_set.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags_set.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.pools[pool] = pool_size

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def can_run_on_DLA(self, layer: Any) -> bool:
        return layer.type.name in self._module.dla_takes  # type: ignore[attr-defined]

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        return Bytes(serialized_timing_cache)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.mismatches.append(ignore_mismatch)
        content = bytes(cache)
        self.cache = cache
        return not content or content.endswith(self._module.__version__.encode())

    def get_timing_cache(self) -> Any:
        cache = self.cache
        return types.SimpleNamespace(serialize=lambda: cache)

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        assert index < self.num_compute_capabilities
        self.capabilities[index] = compute_capability
        return True


class _Refitter:
    name = "Refitter"
    __slots__ = ("_module", "engine", "model")

    def __init__(self, module: FakeTensorrt, engine: Any, logger: Any) -> None:
        self._module, self.engine, self.model = module, engine, None

    def refit_cuda_engine(self) -> bool:
        network = _Network()
        if self.model is None:
            return False
        _Parser(self._module, network, None).parse_from_file(self.model)
        self.engine._refit(network.factors)
        return True


class _ParserRefitter:
    name = "OnnxParserRefitter"
    __slots__ = ("_module", "_refitter")

    def __init__(self, module: FakeTensorrt, refitter: _Refitter, logger: Any) -> None:
        self._module, self._refitter = module, refitter

    def refit_from_bytes(self, model: bytes) -> bool:
        path = Path(self._module.cudart.path).with_name("refit.onnx")
        path.write_bytes(model)
        self._refitter.model = path
        return True
