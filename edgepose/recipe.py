"""What a recipe says: which stages a checkpoint goes through on its way to a bundle, and with which settings.

Invariant: a recipe is data. Reading one runs nothing and imports no builder; every field is honoured by the compiler,
and a key that means nothing in its place (epochs beside `mode: ptq`) is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from edgepose.profiles import find_profile, load_profile
from edgepose.spec import Precision

__all__ = [
    "Export",
    "Importance",
    "MaxDrop",
    "Pattern",
    "Prune",
    "QuantisationAware",
    "QuantiseAfterTraining",
    "RangeEstimator",
    "Recipe",
    "Schedule",
    "Scope",
    "find_profile",
    "load_recipe",
]

Importance = Literal["l1", "l2", "bn_scale", "taylor", "fpgm", "random"]
Scope = Literal["global", "uniform"]
Pattern = Literal["2:4"]
GROUP, KEPT = 4, 2
"""Of `Pattern`: consecutive input channels looked at together, and how many of them may have a weight."""
Schedule = Literal["equal", "cubic"]

RangeEstimator = Literal["default", "minmax", "mean-minmax", "median-minmax", "quantile", "histogram"]
BudgetMetric = Literal["pck_torso_0.2", "pck_torso_0.1", "limb12_extent_0.1", "pck_extent_0.1"]

Text = Annotated[str, msgspec.Meta(min_length=1)]
Epochs = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
LearningRate = Annotated[float, msgspec.Meta(gt=0, le=1)]
Weight = Annotated[float, msgspec.Meta(ge=0, le=1)]
Factor = Annotated[float, msgspec.Meta(ge=0, le=1000)]
Images = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Prune(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Structured pruning, then fine-tuning with the unpruned network as teacher.

    How much goes is said by one of `ratio`, `speedup` and `target_latency_ms`. The latter two look for the least
    pruning that is fast enough: shapes are built as they will be in the end, quantised where the recipe quantises, and
    timed against the unpruned network in the runtime that the first target prefers, on this machine.

    Attributes:
        ratio: Fraction of the multiply-accumulates to remove; channel counts stay multiples of the targets' `round_to`.
        importance: How channels are ranked.
        scope: Rank over the whole network, or remove the same fraction everywhere.
        protected: Layers that keep all their channels, as shell patterns of module names ("backbone.stem.*").
        epochs: Fine-tuning after pruning; 0 leaves it out.
        learning_rate: Peak of the fine-tuning's one-cycle schedule.
        distill_weight: Share of the teacher's outputs in the fine-tuning loss; 0 looks at the labels only.
        feature_weight: Weight of the distance between the network's feature maps and the teacher's, against 1 of the
            rest of the loss; 0 does not look at them.
        training: Other settings of the fine-tuning, by the names that `edgepose train --settings` takes:
            {optimizer: muon, batch_size: 64}.
        steps: Prune in so many steps, each with an equal part of `epochs` behind it, what does not divide in the last.
        schedule: What the steps leave. "equal": the same fraction of what was there. "cubic": much goes at first and
            little in the end (Zhu & Gupta, 2017). Means nothing in one step; without it several are equal.
        sparse_epochs: Fine-tuning before pruning that makes channels small (network slimming; Liu et al., ICCV 2017);
            0 leaves it out.
        sparsity: Weight of the penalty on channels in those epochs; nothing means 1e-4.
        speedup: How many times faster than the unpruned network in the same form: of a recipe that quantises, INT8
            against INT8. The gain over the FP32 original, which quantisation adds to, is reported beside it.
        target_latency_ms: Milliseconds that one inference of one person may take in its finished form.
        ratios: Layers, as shell patterns of module names, each with the fraction of its output channels to remove, in
            the first step and whatever the rest of the network loses; 0 keeps them all. What one of the three goals
            asks of the whole network includes them; without a goal nothing else goes.
        depth: Residual blocks to remove, in the first step and before any channels: those without which the training
            loss grows least. Only blocks whose shortcut is the identity can go. Goals include them, too.
        pattern: "2:4" sets two of every four consecutive input channels of a weight to zero, in the last step, and
            keeps them there through fine-tuning and quantisation. NVIDIA's sparse tensor cores (Ampere, Orin) can skip
            them; no CPU runtime here does, so expect no speed-up on CPUs. `protected` layers stay dense.
    """

    ratio: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = None
    importance: Importance = "taylor"
    scope: Scope = "global"
    protected: tuple[Text, ...] = ()
    epochs: Epochs = 20
    learning_rate: LearningRate = 1e-3
    distill_weight: Weight = 0.5
    feature_weight: Factor = 0.0
    training: dict[Text, Any] = {}
    steps: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    schedule: Schedule | None = None
    sparse_epochs: Epochs = 0
    sparsity: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    speedup: Annotated[float, msgspec.Meta(gt=1, le=100)] | None = None
    target_latency_ms: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    ratios: dict[Text, Annotated[float, msgspec.Meta(ge=0, lt=1)]] = {}
    depth: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        goals = {"ratio": self.ratio, "speedup": self.speedup, "target_latency_ms": self.target_latency_ms}
        given = [name for name, value in goals.items() if value is not None]
        if not given and not (any(self.ratios.values()) or self.depth or self.pattern):
            fix = "add one of them, such as 'ratio: 0.5', or ratios, depth or pattern"
            raise ValueError(f"none of ratio, speedup and target_latency_ms; {fix}")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} together; leave one of them, which says how much goes")
        if self.steps > 1 and not given:
            raise ValueError(f"{self.steps} steps towards none of ratio, speedup and target_latency_ms")
        if self.schedule is not None and self.steps == 1:
            raise ValueError(f"schedule {self.schedule} for one step")
        if self.sparsity is not None and self.sparse_epochs == 0:
            raise ValueError(f"sparsity {self.sparsity:g} without sparse_epochs")
        if 0 < self.epochs < self.steps:
            raise ValueError(f"{self.epochs} epochs for {self.steps} steps, each of which needs one")
        if self.training and self.epochs == self.sparse_epochs == 0:
            raise ValueError(f"training {', '.join(self.training)} without epochs")
        if self.feature_weight > 0 and self.epochs == self.sparse_epochs == 0:
            raise ValueError(f"feature_weight {self.feature_weight:g} without epochs")


class MaxDrop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What quantisation may cost before layers are given back to floating point.

    Attributes:
        points: Most points of `metric` that may be lost on dev against the network that was quantised.
        metric: What is held to the budget.
    """

    points: Annotated[float, msgspec.Meta(ge=0, le=100)]
    metric: BudgetMetric = "pck_torso_0.2"


class QuantiseAfterTraining(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="mode", tag="ptq"
):
    """Quantisation whose ranges come from calibration images alone.

    Attributes:
        calibration_images: Persons of the training split that the ranges are measured on.
        activations: "asymmetric" wastes no code after a ReLU, "symmetric" is all that TensorRT reads; "auto" is
            symmetric where a target runs TensorRT and asymmetric elsewhere. What the other kind would reach on dev is
            in the stage's report.
        protected: Names of modules left in floating point ("head.x").
        range_estimator: How an activation's range follows from the calibration images: NNCF's default; the extremes;
            the mean or median of the extremes of each batch of 32; the mean of each batch's 1e-4 quantiles; or the
            range in which a histogram of the values loses least.
        max_drop: Give the most harmful layers back to floating point, by what they lose per millisecond that they
            save, until no more than this is lost. Nothing means that all layers stay integer.
        min_int8_macs: Least share of the multiplications outside protected parts that every INT8 engine has to execute
            in integers, as its runtime itself says; less is exit code 5.
    """

    calibration_images: Images = 300
    activations: Literal["auto", "asymmetric", "symmetric"] = "auto"
    protected: tuple[Text, ...] = ()
    range_estimator: RangeEstimator = "default"
    max_drop: MaxDrop | None = None
    min_int8_macs: Share = 0.95


class QuantisationAware(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="mode", tag="qat"
):
    """Quantisation whose ranges start from calibration and are then trained along with the weights.

    Attributes:
        calibration_images: Persons of the training split that the ranges start from.
        activations: As for post-training quantisation.
        protected: Names of modules left in floating point ("head.x").
        range_estimator: As for post-training quantisation.
        max_drop: As for post-training quantisation; looked at when training has ended.
        min_int8_macs: As for post-training quantisation.
        epochs: Fine-tuning with fake quantisation.
        learning_rate: Peak of the fine-tuning's one-cycle schedule.
        distill_weight: Share of the floating-point network's outputs in the loss; 0 looks at the labels only.
        feature_weight: Weight of the distance between the network's feature maps and those of the floating-point
            network, against 1 of the rest of the loss; 0 does not look at them.
        training: Other settings of the fine-tuning, as for pruning.
    """

    calibration_images: Images = 300
    activations: Literal["auto", "asymmetric", "symmetric"] = "auto"
    protected: tuple[Text, ...] = ()
    range_estimator: RangeEstimator = "default"
    max_drop: MaxDrop | None = None
    min_int8_macs: Share = 0.95
    epochs: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 5
    learning_rate: LearningRate = 2e-4
    distill_weight: Weight = 0.5
    feature_weight: Factor = 0.0
    training: dict[Text, Any] = {}


Quantise = QuantiseAfterTraining | QuantisationAware


class Export(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From torch to ONNX.

    Attributes:
        opset: Version of the ONNX operator set.
        image_input: Whether the network takes crops as they come from a camera, (batch, h, w, 3) uint8 BGR; order of
            colours, mean, standard deviation and layout are then part of its graph.
        decoding: Whether the network says keypoints and scores instead of what they are decoded from.
    """

    opset: Annotated[int, msgspec.Meta(ge=13, le=23)] = 18
    image_input: bool = False
    decoding: bool = False

    @property
    def has_ends(self) -> bool:
        """Whether anything is to stand before or behind the network in its graph."""
        return self.image_input or self.decoding


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The way from a checkpoint to a bundle; stages that are left out do not happen.

    Attributes:
        name: Name of the recipe, also the default name of its bundles.
        description: One line for people.
        prune: Makes the network narrower.
        quantise: Makes it integer.
        export: Writes it down as ONNX.
        targets: Devices to build engines for, by name of a target or path of a target file.
        precisions: Precisions to compare: of each target and backend all that can be had are built and timed in turns,
            and the fastest is kept, a less accurate one only where it is faster beyond the noise. "auto" compares all
            that the target runs. Nothing means no comparison: INT8 where the network is quantised, else FP32.
        max_drop_points: Most points of `pck_torso_0.2` that may be lost against the checkpoint on `dev`, the part of
            the training split that is held out for choices; more is exit code 3. Nothing means no limit.
        seed: Seed of every random choice of the stages.
    """

    name: Text
    description: Text
    prune: Prune | None = None
    quantise: Quantise | None = None
    export: Export = Export()
    targets: Annotated[tuple[Text, ...], msgspec.Meta(min_length=1)] = ("this-cpu",)
    precisions: Annotated[tuple[Precision, ...], msgspec.Meta(min_length=1)] | Literal["auto"] | None = None
    max_drop_points: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] = 0

    def __post_init__(self) -> None:
        repeated = sorted({target for target in self.targets if self.targets.count(target) > 1})
        if repeated:
            raise ValueError(f"the target {repeated[0]!r} twice in targets")
        named = self.precisions if isinstance(self.precisions, tuple) else ()
        if len(set(named)) < len(named):
            raise ValueError(f"a precision twice in precisions: {', '.join(named)}")


def load_recipe(name_or_path: str, *, targets: Sequence[str] = ()) -> Recipe:
    """The recipe called `name_or_path`.

    Args:
        name_or_path: A recipe that comes with edgepose, or the path of a YAML file (a slash, or .yaml at the end).
        targets: Targets named on the command line; they replace the recipe's own.

    Raises:
        RecipeError: It cannot be found or does not decode; the text names file, line and key.
    """
    recipe = load_profile("recipes", name_or_path, Recipe)
    chosen = tuple(dict.fromkeys(targets))
    return msgspec.structs.replace(recipe, targets=chosen) if chosen else recipe
