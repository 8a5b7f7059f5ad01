"""Scales of an FP8 cache: how large a model's keys and values are, seen on a calibration prompt.

e4m3 is a floating-point format, so a scale need only keep values inside its range, 2**-9 to 448.
Powers of two then lose nothing. Scales that a checkpoint may bring are not read.
"""

import torch
from torch import Tensor

from nsa_kernels.metadata import build_metadata
from nsa_serve.errors import ModelError
from nsa_serve.kv_cache import KVCache
from nsa_serve.models.nsa_transformer import NSATransformer

# Tokens of the calibration prompt.
NUM_TOKENS = 2048
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
# Room between the largest magnitude seen and the largest there may be; beyond it values saturate.
_MARGIN = 2

# k_scale and v_scale of a layer, each [H] fp32.
LayerScales = tuple[Tensor, Tensor]


@torch.inference_mode()
def calibrate_scales(model: NSATransformer, max_num_tokens: int) -> list[LayerScales]:
    """Return every layer's scales, on the model's device; the same ones at each start.

    Runs one prompt of random token ids, at most `max_num_tokens` long, through a cache of the
    model's dtype, which takes that many tokens of memory meanwhile.

    Raises ModelError when a key or value is not finite.
    """
    config, spec = model.config, model.config.nsa
    num_tokens = min(NUM_TOKENS, max_num_tokens)
    num_pages = 1 + -(-num_tokens // spec.block_size)
    cache = KVCache(config, num_pages, dtype=model.dtype, device=model.device)
    for layer in cache.layers:
        for tensor in (layer.k, layer.v, layer.k_cmp, layer.v_cmp):
            tensor.zero_()
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(config.vocab_size, (num_tokens,), generator=generator)
    meta = build_metadata([list(range(1, num_pages))], [0], [num_tokens], spec)
    positions = meta.positions.to(model.device)
    if model.backend == "triton":
        positions = positions.int()  # as in every other step: nothing is compiled for this one
    model(input_ids.to(model.device), positions, model.plan(meta), cache.layers)
    scales = []
    for index, layer in enumerate(cache.layers):
        try:
            k_scale = scale_of(_absmax(layer.k, layer.k_cmp))
            v_scale = scale_of(_absmax(layer.v, layer.v_cmp))
        except ValueError as error:
            raise ModelError(f"no FP8 cache for this model: in layer {index} {error}") from None
        scales.append((k_scale.to(model.device), v_scale.to(model.device)))
    return scales


def scale_of(absmax: Tensor) -> Tensor:
    """Return the least power of two s with 2 absmax <= 448 s, and 1 for 0. [H] fp32, on the CPU.

    Raises ValueError unless every absmax is finite.
    """
    absmax = absmax.float().cpu()
    if not absmax.isfinite().all():
        raise ValueError(f"the largest keys or values of the heads are {absmax.tolist()}")
    # x = mantissa * 2 ** exponent with mantissa in [0.5, 1).
    mantissa, exponent = torch.frexp(absmax * (_MARGIN / FP8_MAX))
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(absmax > 0, torch.ldexp(torch.ones_like(absmax), exponent), 1.0)


def _absmax(raw: Tensor, compressed: Tensor) -> Tensor:
    """Largest magnitude of each head in pages [num_pages, H, tokens, D]: [H]."""
    return torch.maximum(*(pages.abs().amax(dim=(0, 2, 3)) for pages in (raw, compressed)))
