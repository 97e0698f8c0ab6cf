"""Quantisation of a folded torch network through NNCF: prepare → (the caller's fine-tuning) → convert, save, restore.

Invariant: `prepare` returns a module that computes in float what an 8-bit engine computes in integers; `convert` splits
it into float weights and `Ranges`, and `restore` puts the very same module together again, without pickles.

    folded = fold_batch_norms(model)
    fake_quantised = prepare(folded, batches, config)      # post-training quantisation ends here
    fit(fake_quantised, …)                                  # quantisation-aware training, any loop
    float_module, ranges = convert(fake_quantised)          # to ONNX: export.onnx, export.qdq
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import nncf
import numpy as np
import safetensors
import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
from nncf.quantization.range_estimator import RangeEstimatorParameters, RangeEstimatorParametersSet
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer, PTQuantizerSpec, SymmetricQuantizer
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgepose.compress.coverage import complete_coverage
from edgepose.compress.hooks import add_hook, functions_inside, hooked_copy, hooks_of, is_hooked, plain_copy, quiet
from edgepose.compress.protected import OUTPUTS, protected_parts, rules
from edgepose.compress.ranges import Range, Ranges
from edgepose.errors import CheckpointError, RecipeError, SpecError
from edgepose.recipe import RangeEstimator
from edgepose.storage import atomic_file, json_bytes

Batch = Tensor | NDArray[np.float32]
_ESTIMATORS: dict[RangeEstimator, RangeEstimatorParameters | None] = {
    "default": None,
    "minmax": RangeEstimatorParametersSet.MINMAX,
    "mean-minmax": RangeEstimatorParametersSet.MEAN_MINMAX,
    "median-minmax": RangeEstimatorParametersSet.MEDIAN_MINMAX,
    "quantile": RangeEstimatorParametersSet.MEAN_QUANTILE,
    "histogram": RangeEstimatorParametersSet.HISTOGRAM,
}
_KINDS: dict[str, type[BaseQuantizer]] = {"symmetric": SymmetricQuantizer, "asymmetric": AsymmetricQuantizer}


class QuantiseConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How ranges are found.

    Attributes:
        symmetric: Signed activations with zero point 0 everywhere, which TensorRT needs; else unsigned ones with any
            zero point, which are twice as fine after a ReLU.
        estimator: How activation ranges follow from calibration data: NNCF's choice, the extremes, the mean or median
            of each batch's extremes, the mean of each batch's 1e-4 quantiles, or the range in which a histogram of the
            values loses least. (NNCF's mean without outliers takes all of a few batches for outliers: not offered.)
        bias_correction: Shift biases so that the mean error of each layer vanishes ("fast" or NNCF's slow "accurate").
            Off by default: on kpe-s it moves outputs away from the float network's (mean gap 0.37 % against 0.28 %).
        protected: Names of modules that stay float ("block.head.x"), beside those of `compress.protected`.
        subset_size: Calibration images used, whole batches.
        unprotected: Rules of `compress.protected` to break, by name: what each is worth is measured so, no recipe
            offers it.
    """

    symmetric: bool = False
    estimator: RangeEstimator = "default"
    bias_correction: Literal["none", "fast", "accurate"] = "none"
    protected: tuple[str, ...] = ()
    subset_size: int = 300
    unprotected: tuple[str, ...] = ()


class _Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A quantiser's class, settings and places, as `save` writes them."""

    places: tuple[str, ...]
    mode: Literal["symmetric", "asymmetric"]
    scale_shape: tuple[int, ...]
    signed: bool | None
    narrow_range: bool


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where quantisers stand in a network and of which kind they are; their values are tensors."""

    quantisers: tuple[_Place, ...]
    protected: tuple[str, ...] = ()
    version: int = 1


def prepare(folded: nn.Module, batches: Sequence[Batch], config: QuantiseConfig | None = None) -> nn.Module:
    """A fake-quantised copy of `folded`, calibrated, ready for evaluation or fine-tuning.

    Fine-tune it in float32: under bfloat16 autocast NNCF computes scales and zero points in bfloat16, too coarse for
    256 codes.

    Args:
        folded: A network without batch normalisations (`fold_batch_norms`), outputs a tensor or tuple of tensors.
        batches: Calibration inputs from the training split, (B, 3, h, w) float32 each, normalised.
        config: How ranges are found.

    Raises:
        SpecError: No batches, or not (B, 3, h, w) float32.
        RecipeError: A protected name that is no module, or an unprotected one that is no rule.
    """
    config = config or QuantiseConfig()
    _check_protected(folded, config.protected)
    _check_rules(config.unprotected)
    tensors = _subset(batches, config.subset_size)
    parts = protected_parts(folded, without=config.unprotected)
    names = tuple(dict.fromkeys((*config.protected, *parts)))
    protected = functions_inside(folded, names, tensors[0][:1])
    estimator = _ESTIMATORS[config.estimator]
    advanced = AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.DISABLE,  # 7-bit weights are a matter of the dialect, not of the ranges
        disable_bias_correction=config.bias_correction == "none",
        activations_quantization_params=QuantizationParameters(
            mode=QuantizationScheme.SYMMETRIC if config.symmetric else QuantizationScheme.ASYMMETRIC,
            per_channel=False,  # NNCF likes a scale per channel before depthwise convolutions, which no engine takes
        ),
    )
    if estimator is not None:
        advanced.activations_range_estimator_params = estimator
    with quiet():
        wrapped: nn.Module = nncf.quantize(
            copy.deepcopy(folded).eval(),
            nncf.Dataset(tensors),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(tensors),
            fast_bias_correction=config.bias_correction != "accurate",
            ignored_scope=nncf.IgnoredScope(names=list(protected), validate=False),
            advanced_parameters=advanced,
        )
        if config.symmetric:
            _force_signed(wrapped)
        complete_coverage(
            wrapped,
            tensors,
            symmetric=config.symmetric,
            protected=protected,
            round_outputs=OUTPUTS in config.unprotected,
        )
    protect(wrapped, names)
    _pin_zeros(wrapped)
    return wrapped.eval()


def convert(wrapped: nn.Module) -> tuple[nn.Module, Ranges]:
    """Splits a fake-quantised module into its float network, with the weights as trained, and its ranges.

    Raises:
        CheckpointError: The module has no quantisers, or one whose range is not finite.
    """
    _check_hooked(wrapped)
    entries = []
    for place, hook in hooks_of(wrapped).items():
        if isinstance(hook, BaseQuantizer):
            entries.append(_range_of(place, hook))
    return plain_copy(wrapped).eval(), Ranges(ranges=tuple(entries), protected=protected_of(wrapped))


def placement_of(wrapped: nn.Module) -> Placement:
    """Where the quantisers of a fake-quantised module stand."""
    _check_hooked(wrapped)
    places: dict[int, list[str]] = {}
    quantisers: dict[int, BaseQuantizer] = {}
    for place, hook in hooks_of(wrapped).items():
        if isinstance(hook, BaseQuantizer):
            places.setdefault(id(hook), []).append(place)
            quantisers[id(hook)] = hook
    entries = []
    for key, quantiser in quantisers.items():
        settings: dict[str, Any] = quantiser.get_config()
        entries.append(
            _Place(
                places=tuple(places[key]),
                mode="symmetric" if isinstance(quantiser, SymmetricQuantizer) else "asymmetric",
                scale_shape=tuple(int(size) for size in settings["scale_shape"]),
                signed=settings["signedness_to_force"],
                narrow_range=bool(settings["narrow_range"]),
            )
        )
    return Placement(quantisers=tuple(entries), protected=protected_of(wrapped))


def tensors_of(wrapped: nn.Module) -> dict[str, Tensor]:
    """Weights and ranges of a fake-quantised module by name: all that `restore` needs beside its placement."""
    _check_hooked(wrapped)
    return {name: tensor.detach().clone().contiguous() for name, tensor in wrapped.state_dict().items()}


def restore(folded: nn.Module, placement: Placement, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Re-creates a fake-quantised module; its outputs equal the original's to the bit.

    Args:
        folded: A network of the same architecture, folded like the one that was prepared; its weights do not matter.
        placement: What `placement_of` returned.
        tensors: What `tensors_of` returned.

    Raises:
        CheckpointError: Tensors or places that do not fit the network.
    """
    wrapped = hooked_copy(folded)
    for entry in placement.quantisers:
        spec = PTQuantizerSpec(
            num_bits=8,
            mode=QuantizationScheme.SYMMETRIC if entry.mode == "symmetric" else QuantizationScheme.ASYMMETRIC,
            signedness_to_force=entry.signed,
            narrow_range=entry.narrow_range,
            half_range=False,
            scale_shape=entry.scale_shape,
            logarithm_scale=False,
        )
        quantiser = _KINDS[entry.mode](spec)
        for place in entry.places:
            try:
                add_hook(wrapped, place, quantiser)
            except (nncf.InternalError, ValueError) as err:
                raise CheckpointError(f"quantiser {place}", found=str(err), expected="a free place") from err
    try:
        wrapped.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as err:
        raise CheckpointError(
            "fake-quantised weights",
            found=str(err),
            expected=f"tensors of this {type(folded).__name__}",
            fix="build the network with the same configuration and pruning plan",
        ) from err
    protect(wrapped, placement.protected)
    _pin_zeros(wrapped)
    return wrapped.eval()


def save(wrapped: nn.Module, stem: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Writes `<stem>.quant.json` and `<stem>.quant.safetensors`, each atomically; returns both paths.

    Raises:
        CheckpointError: The module has no quantisers.
        StorageError: Disk full, read-only or no permission.
    """
    placement_path, tensors_path = _paths(stem)
    with atomic_file(tensors_path) as temporary:
        save_file(tensors_of(wrapped), temporary)
    with atomic_file(placement_path) as temporary:
        temporary.write_bytes(json_bytes(placement_of(wrapped)))
    return placement_path, tensors_path


def load(folded: nn.Module, stem: str | os.PathLike[str]) -> nn.Module:
    """Reads what `save` wrote and restores it on the architecture of `folded`.

    Raises:
        CheckpointError: Files missing, damaged or of another network.
    """
    placement_path, tensors_path = _paths(stem)
    try:
        placement = msgspec.json.decode(placement_path.read_bytes(), type=Placement)
        tensors = load_file(tensors_path)
    except OSError as err:
        raise CheckpointError(str(err.filename or tensors_path), found=err.strerror or str(err)) from err
    except (msgspec.DecodeError, safetensors.SafetensorError) as err:
        raise CheckpointError(f"{placement_path.parent / Path(stem).name}", found=str(err)) from err
    return restore(folded, placement, tensors)


def _paths(stem: str | os.PathLike[str]) -> tuple[Path, Path]:
    stem = Path(stem)
    return stem.with_name(f"{stem.name}.quant.json"), stem.with_name(f"{stem.name}.quant.safetensors")


@torch.no_grad()
def _range_of(place: str, quantiser: BaseQuantizer) -> Range:
    low, high = (side.detach().double().flatten() for side in quantiser.get_input_low_input_high())
    low_code, high_code = int(quantiser.level_low), int(quantiser.level_high)
    step = (high - low) / (high_code - low_code)
    zero = torch.zeros_like(step) if quantiser.narrow_range else torch.round(low_code - low / step)
    scale = [float(np.float32(value)) for value in step.tolist()]
    if not all(np.isfinite(scale)) or min(scale) <= 0:
        raise CheckpointError(f"quantiser {place}", found="a range that is empty or not finite", fix="calibrate again")
    shape = tuple(quantiser.scale_shape)
    return Range(
        key=place,
        kind="weight" if quantiser.narrow_range else "activation",
        scale=tuple(scale),
        zero_point=tuple(int(value) for value in zero.tolist()),
        low=low_code,
        high=high_code,
        axis=int(np.argmax(shape)) if len(scale) > 1 else None,
    )


def _force_signed(wrapped: nn.Module) -> None:
    """Makes all activations signed; NNCF offers no such constraint, it makes unsigned what never is negative."""
    for hook in hooks_of(wrapped).values():
        if isinstance(hook, SymmetricQuantizer) and not hook.narrow_range:
            hook.signed = True


def _pin_zeros(wrapped: nn.Module) -> None:
    """Keeps 0 the smallest value of ranges that start there, as behind a ReLU, during fine-tuning.

    NNCF's gradient would move it, the zero point would follow, and the engine could no longer take the ReLU for the
    clipping that quantisation does anyway.
    """
    for hook in hooks_of(wrapped).values():
        if isinstance(hook, AsymmetricQuantizer) and bool((hook.input_low >= 0).all()):
            hook.input_low.data.zero_()
            hook.input_low.requires_grad_(False)


def _subset(batches: Sequence[Batch], images: int) -> list[Tensor]:
    """The first batches that together hold `images` images, as tensors."""
    tensors: list[Tensor] = []
    taken = 0
    for index, batch in enumerate(batches):
        if taken >= images:
            break
        tensor = torch.as_tensor(batch)
        if tensor.dim() != 4 or tensor.dtype != torch.float32 or tensor.shape[0] == 0:
            found = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            raise SpecError(f"calibration batch {index}", found=found, expected="(B, 3, h, w) float32")
        tensors.append(tensor)
        taken += int(tensor.shape[0])
    if not tensors:
        raise SpecError("calibration", found="no batches", expected="at least one", fix="hand over training images")
    return tensors


def _check_protected(module: nn.Module, protected: Sequence[str]) -> None:
    names = {name for name, _ in module.named_modules()}
    for name in protected:
        if name not in names:
            leaves = ", ".join(sorted(names - {""})[-8:])
            raise RecipeError("quantise: protected", found=f"{name!r}", expected=f"the name of a module ({leaves}, …)")


def _check_rules(unprotected: Sequence[str]) -> None:
    for name in unprotected:
        if name not in rules():
            raise RecipeError("quantise: unprotected", found=f"{name!r}", expected=f"one of {', '.join(rules())}")


def _check_hooked(wrapped: nn.Module) -> None:
    if not is_hooked(wrapped):
        raise CheckpointError(
            type(wrapped).__name__, found="a module without quantisers", expected="what prepare or restore returned"
        )


# A plain attribute of the root module: it survives deepcopy and is no part of the state dict.
_PROTECTED = "_edgepose_protected"


def protect(wrapped: nn.Module, protected: Sequence[str]) -> None:
    """Note which modules of a fake-quantised network stay float; its quantisers are the caller's business."""
    setattr(wrapped, _PROTECTED, tuple(dict.fromkeys(protected)))


def protected_of(wrapped: nn.Module) -> tuple[str, ...]:
    """Names of the modules that stay float."""
    return tuple(getattr(wrapped, _PROTECTED, ()))
