"""How much of a network an engine really computes in integers.

Invariant: the answer comes from what the runtime executes, never from what the ONNX file asks for.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edgepose.errors import ParityError


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


class Int8Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All convolutions and matrix products of one engine."""

    backend: Literal["onnxruntime", "openvino"]
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

    def require(self, minimum: float) -> None:
        """Checks a recipe's `min_int8_macs`.

        Raises:
            ParityError: Less than `minimum` (0..1) is done in integers; names the largest float kernels.
        """
        if self.share >= minimum:
            return
        largest = sorted(self.float_kernels, key=lambda kernel: -kernel.macs)[:3]
        raise ParityError(
            f"INT8 share in {self.backend}",
            found=f"{self.share:.1%} of multiplications ({', '.join(kernel.name for kernel in largest)} are float)",
            expected=f"at least {minimum:.1%}",
            fix="take modules off the protected list, or lower min_int8_macs",
        )
