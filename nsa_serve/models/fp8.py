"""Weights in 8 bits: e4m3 with one fp32 scale a row (an output channel of the matrix)."""

import torch
from torch import Tensor

from nsa_serve.errors import ConfigError

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# A row of zeros has any scale.
_LEAST_AMAX = 1e-12
# Numbers that are quantized at once: a few fp32 copies of them are needed.
_MAX_ELEMENTS = 4 << 20
# The first GPUs that multiply in e4m3: Ada (8.9) and Hopper (9.0).
_LEAST_CAPABILITY = (8, 9)


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError where `--quantization fp8` cannot work."""
    if device.type != "cuda":
        raise ConfigError(
            f"quantization fp8 needs a GPU that multiplies in 8 bits, but the device is {device}: "
            "leave --quantization out or serve on a GPU (--device cuda)"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise ConfigError(
            f"quantization fp8 needs a GPU that multiplies in 8 bits (compute capability 8.9 or "
            f"later); {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: "
            "leave --quantization out"
        )
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"quantization fp8 needs --dtype bfloat16 for all else, got {name}")


def quantize_rows(rows: Tensor, *, out: Tensor, scales: Tensor) -> None:
    """Write rows [R, K] to out [R, K] e4m3 and scales [R] fp32: rows ~ out * scales.

    A row's largest number becomes 448. The error of a number is at most 1/16 of itself, or 2^-10
    of its row's scale where that is more (e4m3 has three bits after the leading one, and is
    evenly spaced by 2^-9 below 2^-6).
    """
    step = max(1, _MAX_ELEMENTS // rows.shape[1])
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        values, scale = rows[part].to(torch.float32, copy=True), scales[part]
        # By the reciprocal: that is how a GPU divides by a number, and a CPU would not.
        torch.mul(values.abs().amax(dim=1).clamp_(min=_LEAST_AMAX), 1.0 / E4M3_MAX, out=scale)
        # Clamped, because a quotient that rounding carries beyond 448 would become NaN.
        out[part] = values.div_(scale[:, None]).clamp_(-E4M3_MAX, E4M3_MAX)
