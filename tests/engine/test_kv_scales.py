"""Scales of an FP8 cache: powers of two with room above what a calibration prompt shows."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from nsa_kernels.metadata import build_metadata
from nsa_serve.errors import ModelError
from nsa_serve.kv_cache import KVCache
from nsa_serve.kv_scales import FP8_MAX, calibrate_scales, scale_of
from nsa_serve.model_source import ModelSource
from nsa_serve.models.families import load_model_config
from nsa_serve.models.nsa_transformer import NSATransformer
from nsa_serve.models.weights import load_weights

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn


def load(folder: Path, factor: float = 1.0) -> NSATransformer:
    """The model, its weights multiplied by `factor`."""
    source = ModelSource(name="tiny", folder=folder)
    config = load_model_config(source)
    weights = load_weights(source, config, torch.float32)
    for weight in weights.values():
        weight.mul_(factor)
    return NSATransformer(config, weights, max_positions=256).eval()


def test_a_scale_is_the_least_power_of_two_with_room() -> None:
    absmax = torch.tensor([1e-3, 0.9, 1.0, 223.9, 224.0, 224.1, 448.0, 5e4])
    scales = scale_of(absmax)
    assert torch.equal(scales.log2(), scales.log2().round())
    assert (2 * absmax <= FP8_MAX * scales).all()
    assert (2 * absmax > FP8_MAX * scales / 2).all()
    assert scales[3:7].tolist() == [1, 1, 2, 2]


def test_a_head_of_zeros_has_scale_one() -> None:
    assert scale_of(torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_has_no_scale(value: float) -> None:
    with pytest.raises(ValueError, match=r"largest keys or values"):
        scale_of(torch.tensor([1.0, value]))


@pytest.mark.parametrize("name", ["nsa", "llama-nsa", "llama", "llama-mlp"])
def test_calibration_covers_the_prompt_of_every_layer(
    checkpoints: Mapping[str, Path], name: str
) -> None:
    """The cache of another prompt, quantised with the scales, does not saturate."""
    model = load(checkpoints[name])
    config, spec = model.config, model.config.nsa
    scales = calibrate_scales(model, 200)
    assert len(scales) == config.num_layers
    again = calibrate_scales(model, 200)
    num_tokens = 130
    num_pages = 1 + -(-num_tokens // spec.block_size)
    cache = KVCache(config, num_pages, dtype=torch.float32, device=CPU)
    meta = build_metadata([list(range(1, num_pages))], [0], [num_tokens], spec)
    input_ids = torch.arange(num_tokens) % config.vocab_size
    with torch.inference_mode():
        model(input_ids, meta.positions, model.plan(meta), cache.layers)
    slots = meta.slot_mapping
    for layer, pair, repeated in zip(cache.layers, scales, again, strict=True):
        for x, scale, other in zip((layer.k, layer.v), pair, repeated, strict=True):
            assert torch.equal(scale, other), "another start has other scales"
            assert scale.shape == (config.num_kv_heads,) and scale.dtype == torch.float32
            tokens = x.transpose(1, 2).flatten(0, 1)[slots] / scale[:, None]
            assert tokens.abs().max() <= FP8_MAX
            # Nor are they lost at the other end: most are normal numbers.
            assert (tokens.abs() >= 2**-6).float().mean() > 0.9


def test_a_model_of_nan_is_refused(checkpoints: Mapping[str, Path]) -> None:
    model = load(checkpoints["nsa"], factor=torch.nan)
    with pytest.raises(ModelError, match="no FP8 cache for this model: in layer 0"):
        calibrate_scales(model, 40)


def test_the_cache_takes_scales_with_fp8_only(checkpoints: Mapping[str, Path]) -> None:
    config = load_model_config(ModelSource(name="tiny", folder=checkpoints["nsa"]))
    scale = torch.full((config.num_kv_heads,), 0.5)
    scales = [(scale, 2 * scale)] * config.num_layers
    cache = KVCache(config, 3, dtype=E4M3, device=CPU, scales=scales)
    assert all(torch.equal(layer.k_scale, scale) for layer in cache.layers)  # type: ignore[arg-type]
    assert {layer.k.dtype for layer in cache.layers} == {E4M3}
    plain = KVCache(config, 3, dtype=E4M3, device=CPU)
    assert all(layer.v_scale is not None and layer.v_scale.eq(1).all() for layer in plain.layers)
    assert KVCache(config, 3, dtype=torch.float32, device=CPU).layers[0].k_scale is None
    with pytest.raises(ValueError, match=r"scales are for a cache in torch.float8_e4m3fn"):
        KVCache(config, 3, dtype=torch.float32, device=CPU, scales=scales)
