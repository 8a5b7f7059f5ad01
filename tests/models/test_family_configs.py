"""config.json of the nsa_moe and minicpm families to ModelConfig, and rotary scalings."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from nsa_serve.config import EngineConfig, MoEConfig, make_config
from nsa_serve.errors import ModelError
from nsa_serve.model_source import resolve_model
from nsa_serve.models.families import load_model_config
from nsa_serve.models.nsa_transformer import used_branches
from nsa_serve.models.weight_shapes import expected_weights

from .configs import LLAMA, MINICPM4_8B, NSA_MOE, SPARSE_CONFIG, load


def test_nsa_moe(tmp_path: Path) -> None:
    config = load(tmp_path, NSA_MOE)
    assert (config.family, config.kv_per_branch) == ("nsa_moe", True)
    assert (config.head_dim, config.v_head_dim, config.intermediate_size) == (24, 16, 96)
    assert config.moe == MoEConfig(
        num_experts=6,
        num_experts_per_token=2,
        num_shared_experts=2,
        expert_intermediate_size=32,
        num_dense_layers=1,
    )
    assert (config.nsa.compression, config.nsa.gate, config.nsa.gate_hidden_size) == (
        "mlp",
        "mlp",
        40,
    )
    assert (config.nsa.cmp_len, config.nsa.block_size, config.nsa.window_size) == (32, 64, 512)


def test_nsa_moe_weights(tmp_path: Path) -> None:
    weights = expected_weights(load(tmp_path, NSA_MOE))
    attn = "model.layers.2.self_attn."
    for branch in ("slc", "cmp", "swa"):
        assert weights[f"{attn}k_{branch}_proj.weight"] == (2 * 24, 64)
        assert weights[f"{attn}v_{branch}_proj.weight"] == (2 * 16, 64)
    assert weights[attn + "o_proj.weight"] == (64, 8 * 16)
    assert weights[attn + "gate.fc1.weight"] == (40, 64)
    assert weights[attn + "gate.fc2.bias"] == (3 * 8,)
    assert weights[attn + "cmp_v.fc1.weight"] == (256, 32 * 16)
    assert weights["model.layers.0.mlp.down_proj.weight"] == (64, 96)
    assert "model.layers.0.mlp.router.weight" not in weights
    assert weights["model.layers.1.mlp.router.weight"] == (6, 64)
    assert weights["model.layers.1.mlp.experts.5.up_proj.weight"] == (32, 64)
    assert weights["model.layers.1.mlp.shared_experts.down_proj.weight"] == (64, 2 * 32)
    assert not any(name.startswith("model.layers.1.mlp.gate_proj") for name in weights)
    assert not any("k_proj" in name or "g_proj" in name for name in weights)


@pytest.mark.parametrize("count", [None, 0])
def test_nsa_moe_without_experts_is_dense(tmp_path: Path, count: int | None) -> None:
    config = load(tmp_path, NSA_MOE, n_routed_experts=count)
    assert config.moe is None
    assert "model.layers.2.mlp.gate_proj.weight" in expected_weights(config)


def test_nsa_moe_may_share_keys_and_have_no_shared_experts(tmp_path: Path) -> None:
    config = load(tmp_path, NSA_MOE, kv_per_branch=False, n_shared_experts=0)
    names = expected_weights(config)
    assert "model.layers.0.self_attn.k_proj.weight" in names
    assert not any("shared_experts" in name or "k_slc" in name for name in names)


def test_minicpm4_is_infllm_v2(tmp_path: Path) -> None:
    config = load(tmp_path, MINICPM4_8B)
    nsa = config.nsa
    assert (nsa.cmp_len, nsa.cmp_stride, nsa.block_size, nsa.score_map) == (32, 16, 64, "max_pool")
    assert (nsa.num_init_blocks, nsa.num_local_blocks, nsa.num_selected_blocks) == (1, 32, 96)
    assert (nsa.dense_len, nsa.lse_len, nsa.lse_stride, nsa.window_size) == (8192, 128, 64, 0)
    assert (nsa.gate, nsa.gate_constant) == ("constant", (0.0, 1.0, 0.0))
    used = used_branches(config)
    assert (used.cmp, used.slc, used.swa) == (False, True, False)
    assert (config.embedding_scale, config.logit_scale) == (12.0, 256 / 4096)
    assert config.residual_scale == pytest.approx(1.4 / math.sqrt(32))
    assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (32, 2, 128)
    assert (config.eos_token_ids, config.checkpoint_dtype) == ((2, 73440), "bfloat16")
    scaling = config.rope_scaling
    assert (scaling.rope_type, scaling.attention_factor) == ("longrope", 1.0)
    assert (len(scaling.short_factor), scaling.long_factor[1]) == (64, 1 + 1 / 64)
    names = expected_weights(config)
    assert "lm_head.weight" in names and not any("g_proj" in name for name in names)


def test_minicpm_depth_is_that_of_layers_not_of_the_denominator(tmp_path: Path) -> None:
    """MiniCPM4-0.5B: 24 layers, and a mup_denominator that only speculative heads read."""
    config = load(tmp_path, MINICPM4_8B, num_hidden_layers=24, tie_word_embeddings=True)
    assert config.residual_scale == pytest.approx(1.4 / math.sqrt(24))
    assert "lm_head.weight" not in expected_weights(config)


def test_minicpm_top_k_of_both_revisions(tmp_path: Path) -> None:
    sparse = {**SPARSE_CONFIG, "topk_includes_local": True}
    assert load(tmp_path, MINICPM4_8B, sparse_config=sparse).nsa.num_selected_blocks == 64
    # What the published code assumes where a field is missing.
    assert load(tmp_path, MINICPM4_8B, sparse_config={}).nsa == load(tmp_path, MINICPM4_8B).nsa


def test_minicpm_without_sparse_config_is_dense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = load(tmp_path, MINICPM4_8B, sparse_config=None)
    assert "no sparse_config" in caplog.text and "--nsa-config" in caplog.text
    used = used_branches(config)
    assert (used.cmp, used.slc, used.swa) == (False, False, True)
    assert config.nsa.window_size == config.max_position_embeddings
    assert config.nsa.gate_constant[2] == 1.0


@pytest.mark.parametrize("whole", [True, False])
def test_nsa_config_gives_the_sparse_config(tmp_path: Path, whole: bool) -> None:
    file = tmp_path / "sparse.json"
    file.write_text(json.dumps(MINICPM4_8B if whole else {"sparse_config": SPARSE_CONFIG}))
    expected = load(tmp_path, MINICPM4_8B)
    load(tmp_path, MINICPM4_8B, sparse_config=None)
    settings = {"model": str(tmp_path), "nsa_config": str(file)}
    assert load_model_config(resolve_model(make_config(EngineConfig, settings))) == expected


def test_nsa_config_may_describe_minicpm_otherwise(tmp_path: Path) -> None:
    section = {"gate": "constant", "gate_constant": [0, 1, 0], "num_selected_blocks": 20}
    assert load(tmp_path, MINICPM4_8B, nsa=section).nsa.num_selected_blocks == 20
    with pytest.raises(ModelError, match="holds no gate or compression weights"):
        load(tmp_path, MINICPM4_8B, nsa={})


def test_minicpm_temperature_follows_the_contexts(tmp_path: Path) -> None:
    """sqrt(1 + ln(max / old) / ln(old)); `factor` is not what its code reads."""
    scaling = {**MINICPM4_8B["rope_scaling"], "factor": 1.0}
    config = load(tmp_path, MINICPM4_8B, max_position_embeddings=131072, rope_scaling=scaling)
    expected = math.sqrt(1 + math.log(4) / math.log(32768))
    assert config.rope_scaling.attention_factor == pytest.approx(expected)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (YARN, {"factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32.0}),
        ({"type": "yarn", "factor": 4.0}, {"original_max_position_embeddings": 2048}),
        ({**YARN, "factor": None}, {"factor": 4.0}),
        (
            {**YARN, "beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.8},
            {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.8},
        ),
        ({**YARN, "attention_factor": 1.5, "truncate": True}, {"attention_factor": 1.5}),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2] * 8,
                "original_max_position_embeddings": 512,
            },
            {"factor": 4.0, "long_factor": (2.0,) * 8, "attention_factor": None},
        ),
    ],
)
def test_yarn_and_longrope(
    tmp_path: Path, section: dict[str, Any], expected: dict[str, Any]
) -> None:
    scaling = load(tmp_path, LLAMA, rope_scaling=section, max_position_embeddings=2048).rope_scaling
    for name, value in expected.items():
        assert getattr(scaling, name) == value, name


def test_nsa_moe_needs_a_section(tmp_path: Path) -> None:
    fields = {name: value for name, value in NSA_MOE.items() if name != "nsa"}
    with pytest.raises(ModelError, match="no `nsa` section"):
        load(tmp_path, fields)
