"""Layers that every family shares. T tokens, HQ/H query and KV heads, D head_dim."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_serve.config import RopeScaling
from nsa_serve.models.rope_scaling import rotary_frequencies


class Linear(nn.Module):
    """y = x W^T + b, in the weight's dtype.

    bf16 weights on the CPU are kept in oneDNN's blocked layout: the plain matmul re-reads them row
    by row and reaches about half the memory bandwidth at a batch of one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.packed = can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1) if self.packed else weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.packed:
            return self._packed_linear(x, "none")
        return F.linear(x, self.weight, self.bias)

    def silu(self, x: Tensor) -> Tensor:
        """Return silu(self(x))."""
        if self.packed:
            return self._packed_linear(x, "swish")
        return F.silu(F.linear(x, self.weight, self.bias))

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """Return self(x) + other."""
        return self._combined(x, other, "add") if self.packed else self(x) + other

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """Return self(x) * other."""
        return self._combined(x, other, "mul") if self.packed else self(x) * other

    def _packed_linear(self, x: Tensor, activation: str) -> Tensor:
        # The overload by name: resolving it anew costs microseconds a call, 150 times a token.
        result: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self.weight, self.bias, activation, [], ""
        )
        return result

    def _combined(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        # oneDNN applies it to the product while it is in registers: one pass less over [T, out].
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self.weight, self.bias, operation
        )
        return result


def can_pack(weight: Tensor) -> bool:
    """True for bf16 on a CPU where oneDNN computes in it."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and cpu_has_bfloat16()


def cpu_has_bfloat16() -> bool:
    """True when oneDNN is built in and has bf16 matrix products for this processor."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in fp32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) + residual."""

    def __init__(self, gate: Linear, up: Linear, down: Linear) -> None:
        super().__init__()
        self.gate = gate
        self.up = up
        self.down = down

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[T, hidden], [T, hidden] -> [T, hidden]."""
        return self.down.plus(self.up.times(x, self.gate.silu(x)), residual)


class RotaryEmbedding:
    """Cosines and signed sines of the half-rotation ("NeoX") rotary embedding, by position."""

    def __init__(
        self,
        head_dim: int,
        theta: float,
        scaling: RopeScaling,
        max_positions: int,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        frequency, factor = rotary_frequencies(head_dim, theta, scaling, max_positions)
        positions = torch.arange(max_positions, dtype=torch.float32, device=device)
        angle = positions.unsqueeze(1) * frequency.to(device)
        cos, sin = angle.cos() * factor, angle.sin() * factor
        # The sign of the rotation goes into the sine, so that applying it is roll, mul, addcmul.
        self.cos = torch.cat((cos, cos), dim=-1).to(dtype)
        self.sin = torch.cat((-sin, sin), dim=-1).to(dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each [T, 1, D], for `positions` [T]."""
        cos = self.cos.index_select(0, positions).unsqueeze(1)
        return cos, self.sin.index_select(0, positions).unsqueeze(1)


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [T, heads, D] by (cos, sin) of `RotaryEmbedding.at`."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
