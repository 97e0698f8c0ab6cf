"""OpenVINO: its devices, what they are told, and what they say of it afterwards.

Invariant: the precision of the arithmetic is pinned and read back: OpenVINO never drops to bfloat16 just because the
processor can, and a device that takes another precision than it was told is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgepose.errors import BackendUnavailable, BadInput, EnvironmentFault, OnnxError
from edgepose.host import cache_directory, fingerprint
from edgepose.runtime.session import Array, ClosedSession, SessionFacts, check_feeds
from edgepose.spec import Execution, Precision, TensorSpec
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
    """A network compiled by OpenVINO.

    Args:
        path: The .xml of an IR (its .bin beside it) or an .onnx file.
        threads: Threads of inference on the CPU, at least 1.
        precision: Arithmetic of what is not quantised.
        execution: Device, hint and the rest.

    Raises:
        OnnxError: The ONNX file is missing or cannot be loaded.
        BadInput: The same, of an IR.
        BackendUnavailable: The device is not there, has no arithmetic of that precision, or cannot run the network.
    """

    def __init__(
        self, path: Path, *, threads: int, precision: Precision = "fp32", execution: Execution | None = None
    ) -> None:
        core, execution = shared_core(), execution or Execution()
        devices = _devices(core, execution.openvino.device)
        for device in devices:
            _require_precision(core, device, precision)
        try:
            # Reading first tells a broken file from a network that this device cannot run.
            model = core.read_model(str(path))
        except RuntimeError as err:
            kind = OnnxError if path.suffix == ".onnx" else BadInput
            found = "no such file" if not path.is_file() else f"OpenVINO refuses it: {_gist(err)}"
            raise kind(str(path), found=found, expected="an OpenVINO IR (.xml beside its .bin) or ONNX model") from err
        try:
            compiled = core.compile_model(
                model, execution.openvino.device, _config(devices, threads, precision, execution)
            )
        except RuntimeError as err:
            where = f"OpenVINO {execution.openvino.device}"
            raise BackendUnavailable(where, found=f"{path} does not compile: {_gist(err)}") from err
        self._compiled: Any = compiled
        self._said = _said(compiled, devices)
        _check_precision(self._said, precision)
        side_by_side = int(self._said["requests"]) if execution.openvino.hint == "throughput" else 1
        self._requests = [compiled.create_infer_request() for _ in range(max(1, side_by_side))]
        self.inputs = tuple(_tensor_spec(port) for port in compiled.inputs)
        self.outputs = tuple(_tensor_spec(port) for port in compiled.outputs)

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.infer`."""
        if self._compiled is None:
            raise ClosedSession
        checked = check_feeds(feeds, self.inputs)
        try:
            results = self._results(checked)
        except RuntimeError as err:
            raise EnvironmentFault("OpenVINO", found=f"inference failed: {_gist(err)}") from err
        return {spec.name: results[index] for index, spec in enumerate(self.outputs)}

    def _results(self, feeds: dict[str, Array]) -> list[Array]:
        """Outputs in order. Inputs are read in place; outputs are copied, as requests reuse their buffers."""
        count = min((len(value) for value in feeds.values()), default=1)
        parts = min(len(self._requests), count) if self._divisible(feeds) else 1
        if parts == 1:
            found = self._requests[0].infer(feeds, share_inputs=True, share_outputs=False)
            return [found[index] for index in range(len(self.outputs))]
        pieces = {name: np.array_split(value, parts) for name, value in feeds.items()}
        busy = self._requests[:parts]
        for number, request in enumerate(busy):
            request.start_async({name: piece[number] for name, piece in pieces.items()}, share_inputs=True)
        for request in busy:
            request.wait()
        return [
            np.concatenate([np.array(request.get_output_tensor(index).data) for request in busy])
            for index in range(len(self.outputs))
        ]

    def _divisible(self, feeds: dict[str, Array]) -> bool:
        """Whether all that goes in and out has people along its first axis, of any number."""
        sizes = [spec.shape[0] if spec.shape else 0 for spec in (*self.inputs, *self.outputs)]
        return bool(feeds) and all(isinstance(size, str) for size in sizes)

    def facts(self) -> SessionFacts:
        """See `SessionFacts`."""
        if self._compiled is None:
            raise ClosedSession
        # What became of the network's operators: constants and what was fused into others are not executed.
        names = [
            f"{node.get_friendly_name()} ({_text(node, 'layerType')})"
            for node in self._compiled.get_runtime_model().get_ordered_ops()
            if _text(node, "layerType") not in ("Const", "Input", "Output")
        ]
        devices = ",".join(map(str, self._compiled.get_property("EXECUTION_DEVICES")))
        return SessionFacts({devices: tuple(names)}, self._said)

    def close(self) -> None:
        """See `Session.close`."""
        self._compiled, self._requests = None, []


def available_devices() -> tuple[str, ...]:
    """The devices that OpenVINO finds here: "CPU", "GPU.0", …"""
    return tuple(shared_core().available_devices)


def _devices(core: openvino.Core, wanted: str) -> tuple[str, ...]:
    """The devices that may execute the network, all of which have to be there.

    Raises:
        BackendUnavailable: One is not.
    """
    available = tuple(core.available_devices)
    if wanted == "AUTO":
        return available
    names = tuple(wanted.removeprefix("AUTO:").split(","))
    for name in names:
        if not any(there == name or there.startswith(f"{name}.") for there in available):
            raise BackendUnavailable(
                f"OpenVINO device {name}",
                found=f"the devices {', '.join(available) or 'none'}",
                expected=f"{name} among them",
                fix="install the driver of that device, or name one of these",
            )
    return names


def _config(devices: tuple[str, ...], threads: int, precision: Precision, execution: Execution) -> dict[str, Any]:
    """What the devices are told; each of them is told what it knows only."""
    chosen = execution.openvino
    config: dict[str, Any] = {"PERFORMANCE_HINT": chosen.hint.upper()}
    if chosen.cache:
        config["CACHE_DIR"] = str(cache_directory() / "openvino" / fingerprint().digest[:32])
    own = {device: _device_config(device, threads, precision, execution) for device in devices}
    if chosen.device.startswith("AUTO"):
        return {**config, "DEVICE_PROPERTIES": own}
    return {**config, **own[devices[0]]}


def _device_config(device: str, threads: int, precision: Precision, execution: Execution) -> dict[str, Any]:
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _hint(device, precision)}
    if execution.streams and not device.startswith("NPU"):
        config["NUM_STREAMS"] = execution.streams
    if device == "CPU":
        config["INFERENCE_NUM_THREADS"] = threads
        if execution.affinity != "auto":
            config["ENABLE_CPU_PINNING"] = execution.affinity == "pinned"
    return config


def _said(compiled: Any, devices: tuple[str, ...]) -> dict[str, str]:
    """What a compiled network says of its settings; of several devices, those of the first that has it."""
    settings: dict[str, Any] = {}
    with suppress(RuntimeError):  # only AUTO has it
        for own in compiled.get_property("DEVICE_PROPERTIES").values():
            settings = {**own, **settings}

    def read(name: str) -> Any:
        if name in settings:
            return settings[name]
        with suppress(RuntimeError):  # a property that this device does not have
            return compiled.get_property(name)
        return ""

    hint = read("INFERENCE_PRECISION_HINT")
    told = {
        "device": ",".join(map(str, compiled.get_property("EXECUTION_DEVICES"))) or ",".join(devices),
        "precision": hint.to_string() if hasattr(hint, "to_string") else hint,
        "hint": str(read("PERFORMANCE_HINT")).rpartition(".")[2].lower(),
        "threads": read("INFERENCE_NUM_THREADS"),
        "streams": read("NUM_STREAMS"),
        "requests": compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"),
        "pinned": {True: "yes", False: "no"}.get(read("ENABLE_CPU_PINNING"), ""),
        "from_cache": "yes" if read("LOADED_FROM_CACHE") is True else "no",
    }
    return {name: str(value) for name, value in told.items()}


def _hint(device: str, precision: Precision) -> str:
    """An NPU has no 32-bit arithmetic: what an INT8 network leaves float is FP16 there."""
    return "f16" if device.startswith("NPU") and precision == "int8" else _HINTS[precision]


def _check_precision(said: Mapping[str, str], precision: Precision) -> None:
    if said["precision"] and said["precision"] != _hint(said["device"], precision):
        raise BackendUnavailable(
            f"OpenVINO {said['device']}",
            found=f"arithmetic in {said['precision']}",
            expected=f"{_hint(said['device'], precision)}, as it was told",
            fix="choose another precision or device",
        )


def _require_precision(core: openvino.Core, device: str, precision: Precision) -> None:
    if precision in ("fp32", "int8"):
        return
    offered = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if precision.upper() not in offered:
        raise BackendUnavailable(
            f"OpenVINO {device}",
            found=f"a processor that offers {', '.join(offered)}",
            expected=precision.upper(),
            fix="choose another precision",
        )


def _text(node: Any, key: str) -> str:
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


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
