"""How much of a network an engine really computes in integers, and what a recipe demands of it.

Invariant: the answer comes from what the runtime executes, never from what the ONNX file asks for. Importing this loads
no builder.
"""

from __future__ import annotations

import msgspec

from edgepose.errors import ParityError
from edgepose.spec import Backend


class Kernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A convolution or matrix product as the runtime executes it.

    Attributes:
        name: The runtime's name for it.
        operator: The runtime's kind of kernel.
        integer: Whether it multiplies 8-bit integers.
        macs: Multiplications for one image.
    """

    name: str
    operator: str
    integer: bool
    macs: int


class FloatLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A convolution or matrix product that an engine executes in floating point.

    Attributes:
        layer: The module it belongs to; the runtime's name for it where that is not known.
        operator: The runtime's kind of kernel.
        macs: Multiplications for one image.
        reason: Why it is not integer.
        protected: Whether it is meant to be float: a protected part, or one given back for accuracy.
    """

    layer: str
    operator: str
    macs: int
    reason: str
    protected: bool


class Int8Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All convolutions and matrix products of one engine."""

    backend: Backend
    kernels: tuple[Kernel, ...]

    @property
    def macs(self) -> int:
        return sum(kernel.macs for kernel in self.kernels)

    @property
    def share(self) -> float:
        """Part of all multiplications that are done in integers, 0..1."""
        return sum(kernel.macs for kernel in self.kernels if kernel.integer) / max(self.macs, 1)

    @property
    def float_kernels(self) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if not kernel.integer)


class Achieved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was asked for and what an engine made of it.

    Attributes:
        share: Part of all multiplications that are done in integers, 0..1.
        asked_share: The same outside protected parts; 1 where all parts are protected.
        macs: Multiplications for one image.
        float_layers: What is not done in integers, the largest first.
    """

    share: float
    asked_share: float
    macs: int
    float_layers: tuple[FloatLayer, ...]


def require(found: Achieved, minimum: float, where: str) -> None:
    """Check a recipe's `min_int8_macs`.

    Args:
        found: What an engine executes.
        minimum: Least share outside protected parts, 0..1.
        where: What the engine is called in messages.

    Raises:
        ParityError: Less than that is done in integers; names the layers and the reasons.
    """
    if found.asked_share >= minimum:
        return
    guilty = [layer for layer in found.float_layers if not layer.protected]
    named = [f"{layer.layer} ({100 * layer.macs / max(found.macs, 1):.1f} %: {layer.reason})" for layer in guilty[:8]]
    more = f" and {len(guilty) - 8} more" if len(guilty) > 8 else ""
    raise ParityError(
        f"{where}: min_int8_macs",
        found=f"{found.asked_share:.1%} of the multiplications outside protected parts in integers; "
        f"in float: {'; '.join(named)}{more}",
        expected=f"at least {minimum:.1%}",
        fix="protect these layers if they are to stay float, or lower min_int8_macs",
    )
