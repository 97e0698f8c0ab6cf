"""A TensorRT made of Python over the CUDA made of C: engines are JSON, networks multiply, the manners are TensorRT's.

Invariant: it offers nothing that the recorded interfaces lack, and it is as touchy as TensorRT: shapes have to be set
after each change of profile and lie within it, the first enqueue after a change allocates memory (which no capture
survives), and what is refused is False or None and a line in the log, not an exception.
"""

from __future__ import annotations

import json
import types
import weakref
from enum import IntEnum
from importlib.machinery import ModuleSpec
from typing import Any

from tests.runtime.fake_cuda import FakeCudart

Dims = tuple[int, ...]


def plan_of(
    batches: list[tuple[int, int, int]] | None = None, *, factors: dict[str, float] | None = None, **quirks: Any
) -> bytes:
    """An engine from `images` (batch, 2, 3) to `factor * images`, one output for each factor.

    Args:
        batches: Smallest, best and largest batch of each profile; None is a network of batch 4, without profiles.
        factors: Output → factor.
        quirks: "uncapturable", "no_execution", "no_context", "data_dependent", "format", "dtype", "shape_tensor".
    """
    factors = factors or {"double": 2.0}
    batch = 4 if batches is None else -1
    profiles = [{"images": [[size, 2, 3] for size in triple]} for triple in batches or []]
    content = {"shape": [batch, 2, 3], "outputs": factors, "profiles": profiles, "quirks": quirks}
    return b"fake engine" + json.dumps(content).encode()


class FakeTensorrt(types.ModuleType):
    """The module `tensorrt`, or `tensorrt_rtx`.

    Attributes:
        seen: Every plan that was handed to be deserialised.
        contexts: The execution contexts that are alive.
        dla_cores: How many DLA cores the device has.
    """

    def __init__(self, cudart: FakeCudart, name: str = "tensorrt", version: str = "10.16.1.11") -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__version__ = version
        self.cudart = cudart
        self.seen: list[bytes] = []
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self.engines: weakref.WeakSet[Any] = weakref.WeakSet()
        self.dla_cores = 0
        self.start_fault = False
        self.TensorIOMode = IntEnum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2})
        self.TensorFormat = IntEnum("TensorFormat", {"LINEAR": 0, "CHW32": 5})
        self.DataType = IntEnum("DataType", {"FLOAT": 0, "HALF": 1, "BF16": 7})
        self.ILogger = type("ILogger", (), {"ERROR": 1, "WARNING": 2, "INTERNAL_ERROR": 0, "log": _unwritten})
        module = self

        class Runtime(_Runtime):
            def __init__(self, logger: Any) -> None:
                super().__init__(module, logger)

        self.Runtime = Runtime
        if name == "tensorrt_rtx":
            self.CudaGraphStrategy = IntEnum("CudaGraphStrategy", {"DISABLED": 0, "WHOLE_GRAPH_CAPTURE": 1})


def _unwritten(self: Any, severity: int, message: str) -> None:
    raise NotImplementedError("loggers have to write this")


class _Runtime:
    def __init__(self, module: FakeTensorrt, logger: Any) -> None:
        assert isinstance(logger, module.ILogger)
        self._module, self._logger = module, logger
        self.num_DLA_cores = module.dla_cores
        self.DLA_core = -1
        if module.start_fault:
            logger.log(1, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        self._module.seen.append(bytes(serialized_engine))
        head, _, content = bytes(serialized_engine).partition(b"fake engine")
        if head or not content:
            self._logger.log(2, "a warning that nobody needs")
            self._logger.log(1, "Magic tag does not match")
            return None
        return _Engine(self._module, self._logger, json.loads(content), self.DLA_core)


class _Engine:
    def __init__(self, module: FakeTensorrt, logger: Any, content: dict[str, Any], dla_core: int) -> None:
        self._module, self._logger, self._content, self.ran_on = module, logger, content, dla_core
        self._names = ["images", *content["outputs"]]
        module.engines.add(self)

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._content["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._module.TensorIOMode
        return modes.INPUT if name == "images" else modes.OUTPUT

    def get_tensor_shape(self, name: str) -> Dims:
        return tuple(self._content["shape"])

    def get_tensor_dtype(self, name: str) -> Any:
        return self._module.DataType[self._content["quirks"].get("dtype", "FLOAT")]

    def get_tensor_format(self, name: str) -> Any:
        return self._module.TensorFormat[self._content["quirks"].get("format", "LINEAR")]

    def get_tensor_format_desc(self, name: str) -> str:
        return "Channel major FP32 format"

    def is_shape_inference_io(self, name: str) -> bool:
        return bool(self._content["quirks"].get("shape_tensor"))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        return [tuple(dims) for dims in self._content["profiles"][profile_index][name]]

    def create_engine_inspector(self) -> Any:
        text = json.dumps({"Layers": self._content["quirks"].get("layers", []), "Bindings": []})
        return types.SimpleNamespace(get_engine_information=lambda _format: text)

    def _refit(self, factors: dict[str, float]) -> None:
        self._content["outputs"] = factors

    def create_execution_context(self, *, runtime_config: Any = None) -> Any:
        if self._content["quirks"].get("no_context"):
            self._logger.log(1, "Requested amount of GPU memory could not be allocated")
            return None
        return _Context(self._module, self, self._logger, self._content, runtime_config)

    def create_runtime_config(self) -> Any:
        if self._module.__name__ != "tensorrt_rtx":
            raise AttributeError("create_runtime_config: as if this version did not have it")
        return types.SimpleNamespace(cuda_graph_strategy=self._module.CudaGraphStrategy.DISABLED)


class _Context:
    def __init__(
        self, module: FakeTensorrt, engine: _Engine, logger: Any, content: dict[str, Any], runtime_config: Any
    ) -> None:
        self._module, self._engine, self._logger, self._content = module, engine, logger, content
        self.runtime_config = runtime_config
        self._profile = 0
        self._shape: Dims | None = None if content["profiles"] else tuple(content["shape"])
        self._addresses: dict[str, int] = {}
        self._prepared = False
        module.contexts.add(self)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile, self._shape, self._prepared = profile_index, None, False
        return profile_index < len(self._content["profiles"])

    def set_input_shape(self, name: str, shape: Dims) -> bool:
        if self._content["profiles"]:
            low, _, high = self._content["profiles"][self._profile][name]
            if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                self._logger.log(1, f"{name}: {shape} is outside of profile {self._profile}")
                return False
        elif tuple(shape) != tuple(self._content["shape"]):
            return False
        self._prepared = self._prepared and shape == self._shape
        self._shape = shape
        return True

    def infer_shapes(self) -> list[str]:
        if self._content["quirks"].get("infer_fault"):
            raise RuntimeError("shape inference failed")
        return [] if self._shape is not None else ["images"]

    def get_tensor_shape(self, name: str) -> Dims:
        assert self._shape is not None
        return (-1, 6) if self._content["quirks"].get("data_dependent") else self._shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._prepared = self._prepared and self._addresses.get(name) == memory
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        quirks = self._content["quirks"]
        names = ["images", *self._content["outputs"]]
        if quirks.get("no_execution") or self._shape is None or any(not self._addresses.get(name) for name in names):
            self._logger.log(1, "enqueueV3: not all shapes and addresses are set")
            return False
        if (not self._prepared or quirks.get("uncapturable")) and not self._allocate():
            self._logger.log(1, "enqueueV3: no memory, or not while a graph is captured")
            return False
        self._prepared = True
        size_bytes = 4 * self._shape[0] * self._shape[1] * self._shape[2]
        return not any(
            self._module.cudart.scale(
                self._addresses[name], self._addresses["images"], size_bytes, factor, stream_handle
            )
            for name, factor in self._content["outputs"].items()
        )

    def _allocate(self) -> bool:
        """What TensorRT does before the first enqueue of a shape."""
        import ctypes

        library, address = self._module.cudart.library, ctypes.c_void_p()
        if library.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(16)):
            return False
        library.cudaFree(address)
        return True
