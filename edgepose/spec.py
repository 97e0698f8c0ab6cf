"""Every frozen type that crosses a seam between packages: what a network eats, what it says, and where it runs.

Invariant: instances are immutable, have no behaviour but what derives from them, and serialise to JSON with msgspec.

Frames of reference used throughout edgepose: x runs right, y runs down, and integer coordinates are pixel *centres*
(OpenCV's convention). "Source" is the user's image; "input" is the network's input crop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

Backend = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Dialect = Literal["float", "u8s8", "s8s8"]
Aim = Literal["latency", "throughput", "memory", "energy"]
"""What the engine that runs is chosen for."""
AIMS: tuple[Aim, ...] = get_args(Aim)

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]


class Keypoints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keypoint set a network predicts; indices are 0-based positions in `names`.

    Attributes:
        names: One name per keypoint, in output order.
        skeleton: Pairs of indices joined by a limb, for drawing.
        flip_pairs: Pairs of indices that swap places when the image is mirrored.
        sigmas: Per-keypoint falloff of OKS (COCO's k/2), same order as `names`.
    """

    names: tuple[str, ...]
    skeleton: tuple[tuple[int, int], ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] = ()
    sigmas: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        return len(self.names)


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named tensor of a network. Strings in `shape` are free dimensions ("batch"); `dtype` is NumPy's name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From a frame and a person box to the network's input.

    Attributes:
        input_hw: Height and width of the network's input in pixels.
        color: Channel order the network was trained with; frames are always BGR.
        mean: Subtracted per channel, in the network's channel order, on the 0..255 scale.
        std: Divided by afterwards, same order and scale.
        padding: The box, widened to the input's aspect, is multiplied by this before cropping.
        border: Grey value, 0..255, of what lies outside the frame.
    """

    input_hw: tuple[PositiveInt, PositiveInt]
    color: Literal["rgb", "bgr"] = "rgb"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    padding: float = 1.25
    border: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0


class SimCC(msgspec.Struct, frozen=True, tag="simcc", forbid_unknown_fields=True):
    """Coordinates as 1-D classifications (Li et al., ECCV 2022): logits (N, K, w·split_ratio), (N, K, h·split_ratio).

    Bin b stands for input coordinate b / split_ratio (pixel centres are integers).
    """

    split_ratio: float = 2.0
    x: str = "simcc_x"
    y: str = "simcc_y"


class Heatmap(msgspec.Struct, frozen=True, tag="heatmap", forbid_unknown_fields=True):
    """One heat map per keypoint, (N, K, H/stride, W/stride).

    Attributes:
        stride: Input pixels per cell.
        output: Name of the network's output.
        refine: Sub-cell refinement of the peak: none, quarter offset, DARK's Taylor step (Zhang et al., CVPR 2020), or
            the local soft-argmax (the mean position of the mass around the peak; Bulat et al., BMVC 2021).
        alignment: Input coordinate that the centre of cell j stands for. "tiled": cells tile the input, so it is
            (j + 0.5)·stride - 0.5; "scaled": j·stride; "corners": the first and last cells stand for the first and
            last pixels (UDP; Huang et al., CVPR 2020).
    """

    stride: float = 4.0
    output: str = "heatmap"
    refine: Literal["none", "quarter", "dark", "softargmax"] = "dark"
    alignment: Literal["tiled", "scaled", "corners"] = "tiled"


class Regression(msgspec.Struct, frozen=True, tag="regression", forbid_unknown_fields=True):
    """Coordinates said outright, (N, K, 2), with how sure each is: a scale of its errors, a score, or nothing.

    Coordinates are x and y as shares of the input's width and height, 0 and 1 at its outer edges: the input coordinate
    is share · size - 0.5. Scales (N, K, 2) are those of their errors in the same shares, 0..1 (RLE; Li et al., ICCV
    2021). Scores (N, K) are 0..1, and 1 where the network says neither.

    Attributes:
        input_hw: Height and width of the input in pixels, as in `Preprocess`: what the shares are shares of.
        keypoints: Name of the output of coordinates.
        scales: Name of the output of scales; "" for none.
        scores: Name of the output of scores; "" for none. They count where there are scales as well.
    """

    input_hw: tuple[PositiveInt, PositiveInt]
    keypoints: str = "keypoints"
    scales: str = "scales"
    scores: str = ""


class OneStage(msgspec.Struct, frozen=True, tag="one-stage", forbid_unknown_fields=True):
    """All people of a frame at once, as A candidates with a box, a score and keypoints (YOLO-pose, RTMO).

    The input is the whole frame, scaled to fit and centred. Coordinates are pixels of the input, 0 at the outer edge of
    its first pixel: those of pixel centres are 0.5 less.

    Attributes:
        boxes: Name of the output (N, A, 4), x1 y1 x2 y2.
        scores: Name of the output (N, A), 0..1.
        keypoints: Name of the output (N, A, K, 2); "" for a box detector, whose keypoints are its boxes' first and last
            corners.
        keypoint_scores: Name of the output (N, A, K), 0..1; "" gives every keypoint its candidate's score.
        min_score: Candidates below it are nobody.
        max_iou: Of candidates whose boxes overlap by more than this (intersection over union), the highest score stays.
    """

    boxes: str = "boxes"
    scores: str = "scores"
    keypoints: str = "keypoints"
    keypoint_scores: str = "keypoint_scores"
    min_score: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.25
    max_iou: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.65


Decoder = SimCC | Heatmap | Regression | OneStage


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that the run half has to know of a network.

    Attributes:
        name: Name of the network.
        keypoints: What it predicts.
        preprocess: What it eats.
        decoder: Which outputs say where the keypoints are, and how.
        inputs: Its input tensors.
        outputs: Its output tensors, in order.
        visibility: Output (N, K) of logits: their sigmoid is the probability that a joint can be seen; "" for none.
        uncertainty: Output (N, K): natural logarithm of the expected error in input pixels; "" for none.
    """

    name: str
    keypoints: Keypoints
    preprocess: Preprocess
    decoder: Decoder
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    visibility: str = ""
    uncertainty: str = ""

    @property
    def takes_images(self) -> bool:
        """Whether it is fed crops as they are, (N, h, w, 3) uint8 BGR: normalising them is part of its graph then."""
        return self.inputs[0].dtype == "uint8"


OrtProvider = Literal["cpu", "cuda", "tensorrt", "openvino", "coreml", "directml", "xnnpack"]


class OrtOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How ONNX Runtime executes an engine.

    Attributes:
        providers: Its execution providers, in order of preference; all of them have to be there. What none of them
            takes runs on the CPU.
        strict: Refuse engines of which a node runs on none of `providers`.
        optimisation: How far the graph is rewritten: "basic" folds constants, "extended" fuses nodes as well, "all"
            changes the memory layout, too.
        save_optimised: Keep the rewritten graph in this host's cache, so that the next start need not rewrite it.
        io_binding: Feed and fetch through buffers that stay where the first provider computes.
        spinning: Whether idle threads wait actively: a little faster alone, ruinous beside other work.
    """

    providers: Annotated[tuple[OrtProvider, ...], msgspec.Meta(min_length=1)] = ("cpu",)
    strict: bool = False
    optimisation: Literal["none", "basic", "extended", "all"] = "all"
    save_optimised: bool = False
    io_binding: bool = False
    spinning: bool = False


_DEVICES = r"^(CPU|(GPU|NPU)(\.\d+)?|AUTO(:(CPU|GPU|NPU)(\.\d+)?(,(CPU|GPU|NPU)(\.\d+)?)*)?)$"


class OpenvinoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How OpenVINO executes an engine.

    Attributes:
        device: "CPU", "GPU", "NPU" or "AUTO", which takes the best there is; "GPU.1" is the second one, "AUTO:GPU,CPU"
            chooses among these.
        hint: "latency" gives all threads to one inference; "throughput" infers the parts of a batch side by side.
        cache: Keep what was compiled in this host's cache, so that the next start need not compile.
    """

    device: Annotated[str, msgspec.Meta(pattern=_DEVICES)] = "CPU"
    hint: Literal["latency", "throughput"] = "latency"
    cache: bool = False


CudaChoice = Literal["auto", "cuda-python", "ctypes", "pycuda"]
"""Who calls CUDA; "auto" tries cuda-python, then libcudart itself. pycuda is only taken when it is named."""


class TensorrtExecution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How TensorRT engines are executed.

    Attributes:
        cuda: Who calls CUDA.
        graphs: Whether repeated inferences are captured as a CUDA graph and replayed.
        dla_core: The DLA core that engines with DLA layers run on.
    """

    cuda: CudaChoice = "auto"
    graphs: bool = True
    dla_core: Annotated[int, msgspec.Meta(ge=0)] = 0


class Execution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the engines of a target are executed, besides their number of threads.

    Attributes:
        streams: How much runs side by side: branches of a network in ONNX Runtime, parts of a batch in OpenVINO; 0
            leaves it to the runtime, which in ONNX Runtime is 1.
        affinity: "pinned" ties each thread to a physical core of its own, "free" lets the system move them, "auto"
            leaves it to the runtime. ONNX Runtime never moves or ties the thread that calls it.
        onnxruntime: What ONNX Runtime alone has.
        openvino: What OpenVINO alone has.
        tensorrt: What TensorRT alone has.
    """

    streams: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    affinity: Literal["auto", "free", "pinned"] = "auto"
    onnxruntime: OrtOptions = OrtOptions()
    openvino: OpenvinoOptions = OpenvinoOptions()
    tensorrt: TensorrtExecution = TensorrtExecution()


class TensorrtBuild(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How TensorRT engines are built.

    Attributes:
        profiles: Smallest, best and largest batch of each optimisation profile; `max_batch` cuts them off.
        floats: Arithmetic of a float network's engine; decoding inside the network stays in FP32.
        level: How long the builder looks for fast kernels, 0..5.
        workspace_mib: Most memory that one kernel may take for itself; 0 leaves it to TensorRT.
        hardware: Other GPUs that engines run on, slower: none, any from Ampere on, or any of one compute capability.
        version_compatible: Whether newer versions of TensorRT may load the engines, given the lean runtime of the
            version that built them, which is left out of the file; edgepose's own session does not look for one yet.
        dla_core: DLA core that takes the layers it can; the others fall back to the GPU. Batches are fixed then. The
            target's `execution.tensorrt.dla_core` says which core finished engines run on.
        strip_weights: Leave weights out of engines; they are put back from the ONNX file when an engine is loaded.
    """

    profiles: tuple[tuple[PositiveInt, PositiveInt, PositiveInt], ...] = ((1, 8, 64),)
    floats: Literal["fp32", "fp16"] = "fp16"
    level: Annotated[int, msgspec.Meta(ge=0, le=5)] = 3
    workspace_mib: Annotated[int, msgspec.Meta(ge=0)] = 0
    hardware: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    version_compatible: bool = False
    dla_core: Annotated[int, msgspec.Meta(ge=0)] | None = None
    strip_weights: bool = False


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device to build for; the files of profiles/targets hold these.

    Attributes:
        name: Name used on the command line.
        description: One line for people.
        backends: Engines to build, in order of preference.
        precisions: Precisions the device may run natively; of `this-cpu`, BF16 only where the processor has it.
        threads: Intra-op threads; 0 takes all physical cores this process may use.
        weight_bits: Bits of quantised weights; 7 avoids saturating sums on x86 without VNNI; "auto" asks the host.
        round_to: Channel counts of pruned layers are multiples of this.
        compute_capability: NVIDIA compute capability ("8.7"), or several where one engine is to serve all ("8.6, 8.9");
            empty on CPUs.
        max_batch: Largest batch that engines are built and checked for.
        batch: Fixed batch of its engines; 0 leaves it free.
        execution: How its engines are executed.
        tensorrt: How TensorRT engines are built.
        notes: What a user of this device has to know.
    """

    name: str
    description: str
    backends: tuple[Backend, ...]
    precisions: tuple[Precision, ...]
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    weight_bits: Literal[7, 8, "auto"] = "auto"
    round_to: PositiveInt = 16
    compute_capability: str = ""
    max_batch: PositiveInt = 64
    batch: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    execution: Execution = Execution()
    tensorrt: TensorrtBuild = TensorrtBuild()
    notes: str = ""


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One built engine inside a bundle or the per-host cache.

    Attributes:
        target: Name of the target it was built for.
        backend: Runtime that executes it.
        precision: Precision of the bulk of its MACs.
        dialect: How its quantisation is written ("float" when it is not quantised).
        path: The file to hand to the runtime, relative to the bundle's root.
        files: All files that belong to it, relative to the bundle's root.
        builder: Name and version of the library that built it ("openvino 2026.4.1").
        threads: Intra-op threads the engine is to be run with; 0 takes all physical cores.
        execution: How it is to be run besides that.
    """

    target: str
    backend: Backend
    precision: Precision
    dialect: Dialect
    path: str
    files: tuple[str, ...]
    builder: str
    threads: int = 0
    execution: Execution = Execution()


@dataclass(frozen=True, slots=True)
class Poses:
    """The people of one frame.

    Attributes:
        keypoints: (N, K, 2) float32, pixels of the source image, x right, y down.
        scores: (N, K) float32, 0..1, confidence of each keypoint.
        boxes: (N, 4) float32 xyxy, pixels of the source image: the boxes that were cropped, before padding.
        backend: Backend that produced them ("onnxruntime").
        visibility: (N, K) float32, probability that each joint can be seen; None if the network does not say.
        errors_px: (N, K) float32, expected error of each keypoint in source pixels; None if the network does not say.
        degraded: Whether another engine than the chosen one produced them, because that one failed.
        ids: (N,) int64, who they are throughout a video, from 1; None where nobody follows them.
    """

    keypoints: NDArray[np.float32]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float32]
    backend: str = ""
    visibility: NDArray[np.float32] | None = None
    errors_px: NDArray[np.float32] | None = None
    degraded: bool = False
    ids: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return int(self.keypoints.shape[0])

    def take(self, rows: NDArray[np.intp]) -> Poses:
        """Some of the people, in the order of `rows`, (M,) int."""
        visibility, errors_px = (None if v is None else v[rows] for v in (self.visibility, self.errors_px))
        ids = None if self.ids is None else self.ids[rows]
        poses = replace(self, keypoints=self.keypoints[rows], scores=self.scores[rows], boxes=self.boxes[rows])
        return replace(poses, visibility=visibility, errors_px=errors_px, ids=ids)
