"""Shapes without weights: found by name, with a tokenizer, and only for random weights."""

import json
import math
from pathlib import Path

import pytest
import torch

from nsa_serve import model_source
from nsa_serve.config import EngineConfig, ModelConfig, make_config
from nsa_serve.errors import ModelError
from nsa_serve.model_source import PRESETS, load_tokenizer, resolve_model, served_name
from nsa_serve.models.families import load_model_config
from nsa_serve.models.weight_shapes import expected_weights, num_parameters
from nsa_serve.models.weights import load_weights
from nsa_serve.sampling_defaults import load_sampling_defaults


def settings(name: str, **more: object) -> EngineConfig:
    return make_config(EngineConfig, {"model": name, "load_format": "dummy", **more})


def model(name: str) -> ModelConfig:
    return load_model_config(resolve_model(settings(name)))


def test_the_27b_is_the_paper_s() -> None:
    """Section 1.2 of the paper; vocabulary and expert width are ours."""
    config = model("nsa-27b")
    assert (config.family, config.num_layers, config.hidden_size) == ("nsa_moe", 30, 2560)
    assert (config.num_q_heads, config.num_kv_heads) == (64, 4)
    assert (config.head_dim, config.v_head_dim, config.kv_per_branch) == (192, 128, True)
    nsa, moe = config.nsa, config.moe
    assert (nsa.cmp_len, nsa.cmp_stride, nsa.block_size, nsa.window_size) == (32, 16, 64, 512)
    assert (nsa.num_selected_blocks, nsa.num_init_blocks, nsa.num_local_blocks) == (16, 1, 2)
    assert (nsa.compression, nsa.gate) == ("mlp", "mlp")
    assert moe is not None
    assert (moe.num_experts, moe.num_shared_experts, moe.num_experts_per_token) == (72, 2, 6)
    assert moe.num_dense_layers == 1
    assert round(num_parameters(config) / 1e9) == 27


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_needs_dummy_weights(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} is a shape .*--load-format dummy"):
        resolve_model(EngineConfig(model=name))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model(settings(name))
    assert (source.name, source.is_preset) == (name, True)
    assert served_name(settings(name)) == name
    assert load_sampling_defaults(settings(name)) == {}
    # As other built-in names, whatever lies in the working directory.
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model(settings(name)).is_preset
    assert served_name(settings(name)) == name
    with pytest.raises(ModelError, match="revision"):
        resolve_model(settings(name, revision="main"))


def test_an_unknown_name_is_told_of_presets() -> None:
    with pytest.raises(ModelError, match="nsa-27b"):
        resolve_model(EngineConfig(model="nsa-28b"))


@pytest.mark.parametrize("name", PRESETS)
def test_the_tokenizer_has_text_for_every_id(name: str) -> None:
    config, tokenizer = model(name), load_tokenizer(settings(name))
    assert tokenizer.vocab_size == config.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        config.bos_token_id,
        config.eos_token_ids[0],
    )
    text = "Hello, wörld! 你好\n"
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert ids[0] == config.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    words = {tokenizer.token_bytes(i) for i in range(config.vocab_size)}
    assert len(words) == config.vocab_size and b"" not in words
    assert tokenizer.has_chat_template


def test_a_section_replaces_that_of_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "nsa.json"
    file.write_text(json.dumps({"nsa": {"window_size": 100, "gate": "mlp"}}))
    source = resolve_model(settings("nsa-moe-tiny", nsa_config=str(file)))
    assert load_model_config(source).nsa.window_size == 100


def test_the_tiny_one_has_random_weights_of_every_kind() -> None:
    source, config = resolve_model(settings("nsa-moe-tiny")), model("nsa-moe-tiny")
    weights = load_weights(source, config, torch.float32, is_dummy=True)
    assert {name: tuple(value.shape) for name, value in weights.items()} == expected_weights(config)
    assert all(math.isfinite(float(value.sum())) for value in weights.values())


def test_presets_are_packaged() -> None:
    for name in PRESETS:
        assert (Path(model_source.__file__).parent / "assets" / name / "config.json").is_file()
