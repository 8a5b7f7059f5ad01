"""Rotary frequencies of every kind of scaling: one place for both decoders.

Formulas as in transformers' `modeling_rope_utils`, which the checkpoints were trained or released
with; YaRN is arXiv 2309.00071, LongRoPE arXiv 2402.13753.
"""

import math

import torch
from torch import Tensor

from nsa_serve.config import RopeScaling
from nsa_serve.errors import ModelError


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling, max_positions: int
) -> tuple[Tensor, float]:
    """Return inverse frequencies, [D / 2] fp32, and what cosines and sines are multiplied by.

    max_positions: the longest sequence that will be served. "longrope" has two sets of factors, and
    it decides between them once: keys in the cache cannot change theirs when a sequence grows.

    Raises ModelError when a list of factors does not fit head_dim.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency = 1.0 / theta**exponent
    if scaling.rope_type == "linear":
        return frequency / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(frequency, scaling), 1.0
    if scaling.rope_type == "yarn":
        return _yarn(frequency, head_dim, theta, scaling), _yarn_attention_factor(scaling)
    if scaling.rope_type == "longrope":
        return _longrope(frequency, scaling, max_positions), _longrope_attention_factor(scaling)
    return frequency, 1.0


def _llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    # Llama 3.1: wavelengths beyond the old context are stretched, short ones are kept, and those
    # between are blended.
    wavelength = 2 * math.pi / frequency
    old_context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((old_context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return blend * frequency + (1.0 - blend) * frequency / scaling.factor


def _yarn(frequency: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    # Dimensions that turn more than beta_fast times in the old context are kept, those that turn
    # less than beta_slow times are stretched, and those between are blended.
    def dimension(num_turns: float) -> float:
        old_context = scaling.original_max_position_embeddings
        return head_dim * math.log(old_context / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), head_dim - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return (1.0 - ramp) * frequency + ramp * frequency / scaling.factor


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def _longrope(frequency: Tensor, scaling: RopeScaling, max_positions: int) -> Tensor:
    is_long = max_positions > scaling.original_max_position_embeddings
    factors = scaling.long_factor if is_long else scaling.short_factor
    if len(factors) != len(frequency):
        raise ModelError(
            f"rope_scaling.{'long' if is_long else 'short'}_factor has {len(factors)} numbers; "
            f"head_dim needs {len(frequency)}"
        )
    return frequency / torch.tensor(factors, dtype=torch.float32)


def _longrope_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    old_context = scaling.original_max_position_embeddings
    return math.sqrt(1 + math.log(scaling.factor) / math.log(old_context))
