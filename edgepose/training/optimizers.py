"""Optimisers: AdamW as torch has it, and Muon for the weights of convolutions and linear layers.

Invariant: both take one learning rate: Muon's steps are scaled to the size of AdamW's, so schedules and weight decay
carry over; all their state is in `state_dict()`, and a resumed run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from edgepose.blocks.orn import GatedAttentionUnit
from edgepose.training.config import TrainConfig

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan et al., 2024: a quintic with a steep slope at 0; singular values end up near 1, not at it."""
_STEPS = 5
_MOMENTUM = 0.95
_ADAMW_SIZE = 0.2  # root mean square of an AdamW step per unit of learning rate (Liu et al., 2025)
_LEAST_SIDE = 16  # with fewer channels on one side there is next to no spectrum to even out


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz iterations (Jordan et al., "Muon", 2024).

    torch's own takes matrices only; here a convolution's weight is a matrix of one row per output channel.
    """

    def __init__(self, params: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": learning_rate, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step along the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["weight_decay"])
        return loss

    def _move(self, parameter: nn.Parameter, rate: float, decay: float) -> None:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        momentum: Tensor = state["momentum"]
        momentum.lerp_(parameter.grad, 1 - _MOMENTUM)
        matrix = parameter.grad.lerp(momentum, _MOMENTUM).reshape(len(parameter), -1)  # Nesterov's look ahead
        update = orthogonalised(matrix).mul_(_ADAMW_SIZE * max(matrix.shape) ** 0.5)
        parameter.mul_(1 - rate * decay).sub_(update.reshape(parameter.shape), alpha=rate)


def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest matrix with all singular values 1, roughly: they come out between 0.5 and 1.3.

    Args:
        matrix: (m, n) float32. The iterations run in bfloat16, as the paper's do.
    """
    a, b, c = _NEWTON_SCHULZ
    wide = matrix.bfloat16() if len(matrix) <= matrix.shape[1] else matrix.bfloat16().T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    nearest: Tensor = wide if len(matrix) <= matrix.shape[1] else wide.T
    return nearest.to(matrix.dtype)


def make_optimizers(model: nn.Module, loss: nn.Module, config: TrainConfig) -> tuple[torch.optim.Optimizer, ...]:
    """Optimisers over all that can be trained in a network and in its loss.

    Only matrices and convolution kernels decay.
    """
    trained = [p for module in (model, loss) for p in module.parameters() if p.requires_grad]
    orthogonal = _orthogonal(model) if config.optimizer == "muon" else []
    chosen = {id(p) for p in orthogonal}
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in chosen]
    others = [p for p in trained if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=config.learning_rate)
    return (plain, Muon(orthogonal, config.learning_rate, config.weight_decay)) if orthogonal else (plain,)


def _orthogonal(model: nn.Module) -> list[nn.Parameter]:
    """Hidden weights that mix many channels with many.

    Not the first layer, not depthwise kernels, not layers that give outputs or read whole maps, which AdamW serves
    better (Jordan et al.): of linear layers only those of attention are hidden.
    """
    found: dict[int, nn.Parameter] = {}
    attention = {part for unit in model.modules() if isinstance(unit, GatedAttentionUnit) for part in unit.children()}
    for part in model.modules():
        if (isinstance(part, nn.Conv2d) and part.groups == 1) or (isinstance(part, nn.Linear) and part in attention):
            weight = cast("nn.Parameter", part.weight)
            if weight.requires_grad and min(weight.shape[:2]) >= _LEAST_SIDE:
                found[id(weight)] = weight
    return list(found.values())
