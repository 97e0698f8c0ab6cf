"""Losses: values by hand, joints that do not count, distillation from an equal teacher."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from edgepose.blocks.config import KPEConfig, LossConfig, spec_of
from edgepose.blocks.losses import (
    DIVERGENCE_SCALE,
    HEATMAP_SCALE,
    SIMCC_SCALE,
    KeypointLoss,
    distillation_loss,
    hardest,
    joint_weights,
    keypoint_loss,
    make_loss,
    poisson_divergence,
    soft_argmax,
    wing,
)
from edgepose.errors import SpecError
from edgepose.pose.codec import encode_heatmap, encode_regression, encode_simcc
from edgepose.spec import Decoder, Heatmap, Keypoints, Regression, SimCC

HW = (32, 24)
DECODERS: dict[str, Decoder] = {"simcc": SimCC(), "heatmap": Heatmap(stride=4.0), "regression": Regression(HW)}
KINDS = [
    *((head, kind) for head in ("simcc", "heatmap") for kind in ("default", "mse", "kl", "wing")),
    *(("regression", kind) for kind in ("default", "mse", "wing")),
]
POINTS = np.array([[[5.0, 7], [20, 30]], [[11, 11], [3, 29]]], np.float32)


def targets_of(decoder: Decoder) -> tuple[Tensor, ...]:
    if isinstance(decoder, SimCC):
        return tuple(torch.from_numpy(t) for t in encode_simcc(POINTS, HW, decoder, 2.0))
    if isinstance(decoder, Regression):
        return (torch.from_numpy(encode_regression(POINTS, decoder)),)
    return (torch.from_numpy(encode_heatmap(POINTS, HW, decoder, 2.0)),)


def outputs_of(decoder: Decoder, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(decoder, Regression):
        return [torch.rand(2, 2, 2, generator=generator).add(0.01).requires_grad_() for _ in range(2)]
    return [torch.randn(t.shape, generator=generator).requires_grad_() for t in targets_of(decoder)]


def loss_of(head: str, kind: str, **options: float) -> KeypointLoss:
    """As `make_loss` makes it, with a flow that has already learnt something."""
    config = KPEConfig("tiny", (32, 32), 4, (8, 8, 8, 8), (1, 1, 1, 1), 8, head=head)  # type: ignore[arg-type]
    spec = msgspec.structs.replace(spec_of(config, Keypoints(("a", "b"))), decoder=DECODERS[head])
    loss = make_loss(spec, msgspec.convert({"kind": kind, **options}, LossConfig))
    if loss.flow is not None:
        for number, parameter in enumerate(loss.flow.parameters()):
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    return loss


@pytest.mark.parametrize("options", [{}, {"ohkm": 1}])
@pytest.mark.parametrize(("head", "kind"), KINDS)
def test_joints_without_weight_have_no_gradient_and_no_say(head: str, kind: str, options: dict[str, int]) -> None:
    decoder, criterion = DECODERS[head], loss_of(head, kind, **options)
    outputs, targets = outputs_of(decoder), targets_of(decoder)
    weights = torch.tensor([[1.0, 0], [0, 1]])
    loss = criterion(outputs, targets, weights)
    loss.backward()
    for output in outputs:
        if output.grad is None:  # scales, which only a likelihood reads
            assert (head, kind) in {("regression", "mse"), ("regression", "wing")}
            continue
        assert not output.grad[0, 1].any()
        assert not output.grad[1, 0].any()
        assert output.grad[0, 0].any()
    disturbed = [o.detach().clone() for o in outputs]
    for output in disturbed:
        output[0, 1] += 100
    assert criterion(disturbed, targets, weights).item() == pytest.approx(loss.item())


@pytest.mark.parametrize(("head", "kind"), KINDS)
def test_a_batch_without_labels_costs_nothing(head: str, kind: str) -> None:
    decoder, criterion = DECODERS[head], loss_of(head, kind)
    outputs = outputs_of(decoder)
    loss = criterion(outputs, targets_of(decoder), torch.zeros(2, 2))
    loss.backward()
    assert loss.item() == 0
    assert all(o.grad is None or not o.grad.any() for o in outputs)
    assert all(p.grad is not None and not p.grad.any() for p in criterion.parameters())


def test_labels_that_do_not_count_may_be_anything() -> None:
    outputs, weights = outputs_of(DECODERS["regression"]), torch.tensor([[1.0, 0], [1, 1]])
    (target,) = targets_of(DECODERS["regression"])
    target[0, 1] = torch.inf
    loss = loss_of("regression", "default")(outputs, (target,), weights)
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(o.grad is not None and o.grad.isfinite().all() for o in outputs)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_loss_is_a_mean_over_the_weight(kind: str) -> None:
    decoder = DECODERS[kind]
    outputs, targets = outputs_of(decoder), targets_of(decoder)
    single = [keypoint_loss(outputs, targets, torch.eye(4)[i].reshape(2, 2), decoder).item() for i in range(4)]
    together = keypoint_loss(outputs, targets, torch.tensor([[1.0, 1], [1, 0]]), decoder).item()
    assert together == pytest.approx(np.mean(single[:3]), rel=1e-5)


def test_cross_entropy_by_hand() -> None:
    flat = [torch.zeros(t.shape) for t in targets_of(SimCC())]
    expected = (math.log(48) + math.log(64)) / 2  # every bin is as likely as another
    loss = keypoint_loss(flat, targets_of(SimCC()), torch.ones(2, 2), SimCC())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_labels_themselves_are_the_best_answer() -> None:
    weights = torch.ones(2, 2)
    heat = targets_of(DECODERS["heatmap"])
    assert keypoint_loss(heat, heat, weights, DECODERS["heatmap"]).item() == 0
    labels = targets_of(SimCC())
    perfect = [t.clamp(min=1e-20).log() for t in labels]
    best = keypoint_loss(perfect, labels, weights, SimCC())
    for seed in range(3):
        moved = [p + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) for p in perfect]
        assert keypoint_loss(moved, labels, weights, SimCC()) > best


@pytest.mark.parametrize("kind", DECODERS)
def test_an_equal_teacher_teaches_nothing(kind: str) -> None:
    decoder = DECODERS[kind]
    outputs = outputs_of(decoder)
    loss = distillation_loss(outputs, [o.detach().clone() for o in outputs], decoder)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert all(o.grad is not None and o.grad.abs().max() < 1e-6 for o in outputs)
    other = distillation_loss(outputs, [o.detach() for o in outputs_of(decoder, seed=1)], decoder)
    assert other.item() > 0.1


def test_distillation_ignores_a_constant_on_logits() -> None:
    outputs = [o.detach() for o in outputs_of(SimCC())]
    assert distillation_loss([o + 3 for o in outputs], outputs, SimCC()).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_bfloat16_outputs_are_summed_in_float32(kind: str) -> None:
    decoder = DECODERS[kind]
    outputs, targets = outputs_of(decoder), targets_of(decoder)
    rounded = [o.detach().bfloat16() for o in outputs]
    expected = keypoint_loss([o.float() for o in rounded], targets, torch.ones(2, 2), decoder)
    loss = keypoint_loss(rounded, targets, torch.ones(2, 2), decoder)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item())
    assert distillation_loss(rounded, rounded, decoder).item() == pytest.approx(0, abs=1e-5)


def peaks(*bins: int, size: int = 8) -> Tensor:
    """Logits (1, K, size) that are certain of one bin each."""
    return 1000.0 * torch.nn.functional.one_hot(torch.tensor([bins]), size).float()


def test_divergence_is_cross_entropy_without_the_labels_own() -> None:
    decoder, labels = SimCC(), targets_of(SimCC())
    config, weights = LossConfig(kind="kl"), torch.ones(2, 2)
    perfect = [t.clamp(min=1e-20).log() for t in labels]
    assert keypoint_loss(perfect, labels, weights, decoder, config).item() == pytest.approx(0, abs=1e-5)
    flat = [torch.zeros_like(t) for t in labels]
    half = torch.tensor([[[0.5, 0.5, 0, 0]]])
    found = keypoint_loss([torch.zeros(1, 1, 4)] * 2, [half, half], torch.ones(1, 1), decoder, config)
    assert found.item() == pytest.approx(math.log(4) - math.log(2))
    assert keypoint_loss(flat, labels, weights, decoder, config) > 0.5


def test_squared_errors_by_hand() -> None:
    squared, one = LossConfig(kind="mse"), torch.ones(1, 1)
    certain = [torch.nn.functional.one_hot(torch.tensor([[b]]), 4).float() for b in (0, 3)]
    # A flat answer of 1/4 everywhere: 3/4 too little at one bin, 1/4 too much at three, on both axes.
    found = keypoint_loss([torch.zeros(1, 1, 4)] * 2, certain, one, SimCC(), squared)
    assert found.item() == pytest.approx(SIMCC_SCALE * (0.75**2 + 3 * 0.25**2))
    maps, labels = torch.tensor([[[[0.0, 0.5], [1, 0]]]]), torch.tensor([[[[0.0, 0], [0.8, 0]]]])
    found = keypoint_loss([maps], [labels], one, Heatmap(), squared)
    assert found.item() == pytest.approx(HEATMAP_SCALE * (0.5**2 + 0.2**2) / 4)
    shares, label = torch.tensor([[[0.5, 0.2]]]), torch.tensor([[[0.4, 0.4]]])
    found = keypoint_loss([shares, shares], [label], one, Regression(HW), squared)
    assert found.item() == pytest.approx(SIMCC_SCALE * (0.1**2 + 0.2**2) / 2)


def test_the_divergence_of_maps_is_a_mean_over_cells() -> None:
    maps, labels = torch.tensor([[[[0.5, 0.5], [0.5, 1]]]]), torch.tensor([[[[1.0, 0.5], [0.5, 1]]]])
    found = keypoint_loss([maps], [labels], torch.ones(1, 1), Heatmap(), LossConfig(kind="kl"))
    assert found.item() == pytest.approx(DIVERGENCE_SCALE * (math.log(2) - 0.5) / 4)


def test_wing_by_hand() -> None:
    config = LossConfig(wing_px=10, wing_curve_px=2)
    error = torch.tensor([0.0, 2, -2, 9.999999, 10, 30], requires_grad=True)
    # w·ln(1 + x/ε) up to w and x - (w - w·ln(1 + w/ε)) above, divided by w.
    expected = [0, math.log(2), math.log(2), math.log(6), math.log(6), 2 + math.log(6)]
    found = wing(error, config)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    found.sum().backward()
    assert error.grad is not None
    assert error.grad[4:].tolist() == pytest.approx([0.1, 0.1])
    assert error.grad[1].item() == pytest.approx(1 / 4)


def test_wing_measures_decoded_coordinates_in_pixels() -> None:
    config, one = LossConfig(kind="wing", wing_px=10, wing_curve_px=2), torch.ones(1, 1)
    labels = [peaks(2).softmax(-1), peaks(6).softmax(-1)]
    outputs = [peaks(6), peaks(6)]  # 4 bins, which are 2 px, too far right
    default = keypoint_loss(outputs, labels, one, SimCC(), LossConfig())
    found = keypoint_loss(outputs, labels, one, SimCC(), config)
    assert (found - default).item() == pytest.approx(math.log(2) / 2, rel=1e-3)  # the mean of x and y
    maps = torch.zeros(1, 1, 4, 6)
    label = maps.clone()
    maps[0, 0, 1, 4], label[0, 0, 1, 1] = 1, 1
    default = keypoint_loss([maps], [label], one, Heatmap(stride=2), LossConfig())
    found = keypoint_loss([maps], [label], one, Heatmap(stride=2), config)
    # Three cells of 2 px in x, none in y.
    assert (found - default).item() == pytest.approx(math.log(1 + 6 / 2) / 2, rel=1e-2)
    share = torch.tensor([[[0.5, 0.5]]])
    found = keypoint_loss([share + torch.tensor([2 / 24, 0]), share], [share], one, Regression(HW), config)
    assert found.item() == pytest.approx(math.log(2) / 2, rel=1e-4)


def test_soft_argmax_finds_a_peak_between_cells() -> None:
    decoder = Heatmap(stride=4.0)
    points = np.array([[[12.2, 13.7], [9.5, 20.1]]], np.float32)  # far enough from the border
    labels = torch.from_numpy(encode_heatmap(points, (32, 32), decoder, 3.0)).requires_grad_()
    found = 4 * (soft_argmax(labels) + 0.5) - 0.5
    assert np.abs(found.detach().numpy() - points).max() < 0.1
    found.sum().backward()
    assert labels.grad is not None
    assert labels.grad.any()


def test_soft_argmax_reads_empty_maps_in_their_middle() -> None:
    assert soft_argmax(torch.full((1, 1, 3, 5), -0.1)).flatten().tolist() == pytest.approx([2, 1])


@pytest.mark.parametrize("maps", [0.5, 0.02, 0.0, -0.3, 2.0])
@pytest.mark.parametrize("target", [0.0, 0.01, 0.3, 1.0])
def test_divergence_of_maps_is_least_at_the_labels(maps: float, target: float) -> None:
    value = torch.tensor(maps, dtype=torch.float64, requires_grad=True)
    label = torch.tensor(target, dtype=torch.float64)
    loss = poisson_divergence(value, label)
    assert loss.item() >= 0
    assert (loss.item() == pytest.approx(0, abs=1e-12)) == (maps == target)
    loss.backward()
    assert value.grad is not None
    assert value.grad.item() == pytest.approx((maps - target) / max(maps, 0.02))
    if min(maps, target) >= 0.02:
        assert loss.item() == pytest.approx(target * math.log(target / maps) - target + maps)


def test_hard_joints_alone_are_mined() -> None:
    values = torch.tensor([[3.0, 1, 2, 9], [1, 1, 1, 1]])
    weights = torch.tensor([[1.0, 1, 0.5, 0], [1, 1, 1, 1]])
    assert hardest(values, weights, 0) is weights
    assert hardest(values, weights, 4) is weights
    # The fourth joint of the first person has the largest loss and does not count.
    assert hardest(values, weights, 2).tolist() == [[1, 0, 0.5, 0], [1, 1, 0, 0]]
    assert hardest(values, weights, 3).tolist() == [[1, 1, 0.5, 0], [1, 1, 1, 0]]
    certain = [torch.nn.functional.one_hot(torch.tensor([[0, 0, 0]]), 8).float()] * 2
    logits = torch.zeros(1, 3, 8)
    logits[0, 1, 0], logits[0, 2, 1] = 5.0, 5.0
    losses = [-logits[0, k].log_softmax(-1)[0].item() for k in range(3)]
    for count, expected in ((1, losses[2]), (2, (losses[2] + losses[0]) / 2), (0, sum(losses) / 3)):
        found = keypoint_loss([logits] * 2, certain, torch.ones(1, 3), SimCC(), LossConfig(ohkm=count))
        assert found.item() == pytest.approx(expected)


def test_hidden_joints_may_count_less() -> None:
    weights, visible, known = (
        torch.tensor([[1.0, 1, 1, 0]]),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.tensor([[1.0, 1, 0, 1]]),
    )
    assert joint_weights(weights, visible, known, LossConfig()).tolist() == [[1, 1, 1, 0]]
    found = joint_weights(weights, visible, known, LossConfig(hidden_weight=0.25))
    assert found.tolist() == [[1, 0.25, 1, 0]]


def test_the_spatial_term_by_hand() -> None:
    # 16 bins of half a pixel over 2 x 4 cells: x cells are 2 px, y cells 4 px wide.
    x, y = (torch.nn.functional.one_hot(torch.tensor([[b]]), 16).float() for b in (6, 14))
    logits, weights = [torch.zeros(1, 1, 16)] * 2, torch.ones(1, 1)
    maps = torch.randn(1, 1, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    criterion = loss_of("simcc", "default", spatial=0.5)
    plain = criterion.config.spatial * -maps.flatten().log_softmax(0)
    # x = 3 px lies in cell 1 (1.5 to 3.5), y = 7 px in cell 1 (3.5 to 7.5).
    found = criterion(logits, (x, y), weights, maps=maps)
    assert found.item() == pytest.approx(math.log(16) + plain[1 * 4 + 1].item(), rel=1e-5)
    # Bin 7 is the edge between cells 1 and 2: half of it lies in either.
    edge = torch.nn.functional.one_hot(torch.tensor([[7]]), 16).float()
    found = criterion(logits, (edge, y), weights, maps=maps)
    assert found.item() == pytest.approx(math.log(16) + (plain[5] + plain[6]).item() / 2, rel=1e-5)
    found.backward()
    assert maps.grad is not None
    assert maps.grad.abs().sum() > 0


@pytest.mark.parametrize("point", [(0.0, 0.0), (23.0, 31.0), (11.3, 17.8)])
def test_binned_labels_stay_where_they_are(point: tuple[float, float]) -> None:
    decoder = SimCC()
    x, y = (torch.from_numpy(t) for t in encode_simcc(np.array([[point]], np.float32), HW, decoder, 1.5))
    maps = torch.zeros(1, 1, 16, 12, requires_grad=True)  # cells of 2 px
    loss_of("simcc", "default", spatial=1.0)([x * 0, y * 0], (x, y), torch.ones(1, 1), maps=maps).backward()
    assert maps.grad is not None
    label = 1 / (16 * 12) - maps.grad[0, 0]  # of a cross-entropy the gradient is softmax minus label
    assert label.sum().item() == pytest.approx(1, abs=1e-4)
    centre = [(label.sum(0) * torch.arange(12)).sum() * 2 + 0.5, (label.sum(1) * torch.arange(16)).sum() * 2 + 0.5]
    expected = [(x * torch.arange(48)).sum() / 2, (y * torch.arange(64)).sum() / 2]
    near_border = point[0] in (0.0, 23.0)  # where the outermost half pixels count to the outermost cells
    assert [c.item() for c in centre] == pytest.approx([e.item() for e in expected], abs=0.3 if near_border else 1e-2)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(SpecError, match=r"loss: kind: found kl for a regression head, expected default, mse or wing"):
        loss_of("regression", "kl")
    for head in ("heatmap", "regression"):
        with pytest.raises(SpecError, match=r"loss: spatial: found 0.5"):
            loss_of(head, "default", spatial=0.5)
    with pytest.raises(SpecError, match=r"outputs without keypoint maps.*fake-quantised"):
        loss_of("simcc", "default", spatial=0.5)(outputs_of(SimCC()), targets_of(SimCC()), torch.ones(2, 2))
    for change in ({"ohkm": -1}, {"hidden_weight": -0.1}, {"wing_px": 0}, {"kind": "huber"}, {"ohkn": 3}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(change, LossConfig)


def test_only_residual_likelihood_learns_itself() -> None:
    assert [bool(list(loss_of(head, kind).parameters())) for head, kind in KINDS] == [
        (head, kind) == ("regression", "default") for head, kind in KINDS
    ]


def test_outputs_behind_the_decoders_are_left_out() -> None:
    for head, decoder in DECODERS.items():
        outputs, targets, ones = outputs_of(decoder), targets_of(decoder), torch.ones(2, 2)
        more = [*outputs, torch.full((2, 2), torch.nan)]
        assert loss_of(head, "default")(more, targets, ones) == loss_of(head, "default")(outputs, targets, ones)
        assert distillation_loss(more, more, decoder).isfinite()
