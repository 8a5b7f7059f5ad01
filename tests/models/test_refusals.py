"""Fields that would change the output and are not computed: each is refused, by name and reason."""

from pathlib import Path
from typing import Any

import pytest

from nsa_serve.errors import ModelError
from nsa_serve.models.refusals import _RULES

from .configs import FAMILIES, LLAMA, LLAMA_NSA, MINICPM4_8B, NSA_MOE, SPARSE_CONFIG, load

# Of any family: what it is called, a value that is used, one that is not, and why it is refused.
EVERYWHERE: list[tuple[str, Any, Any, str]] = [
    ("quantization_config", {"bits": 4}, None, "quantized"),
    ("compression_config", {"bits": 4}, None, "quantized"),
    ("kv_lora_rank", 512, 0, "MLA"),
    ("q_lora_rank", 1536, None, "MLA"),
    ("qk_rope_head_dim", 64, 0, "MLA"),
    ("qk_nope_head_dim", 128, 0, "MLA"),
    ("index_topk", 2048, None, "MLA"),
    ("index_n_heads", 64, None, "MLA"),
    ("sliding_window", 4096, None, "window"),
    ("sliding_window", [512, None], [], "window"),
    ("sliding_window_layers", [0, 2], [], "windows"),
    ("layer_types", ["full_attention", "sliding_attention"], ["full_attention"], "several kinds"),
    ("mixer_types", ["minicpm4", "lightning-attn"], None, "MiniCPM-SALA"),
    ("attention_chunk_size", 8192, None, "chunks"),
    ("attn_use_rope", False, True, "rotary"),
    ("use_rope", False, True, "rotary"),
    ("no_rope", True, False, "rotary"),
    ("no_rope_layers", [1, 0], [], "rotary"),
    ("no_rope_layer_interval", 4, 0, "rotary"),
    ("use_nope", True, False, "rotary"),
    ("rope_interleave", True, False, "half-rotation"),
    ("rope_interleaved", True, False, "half-rotation"),
    ("alibi", True, False, "distance"),
    ("qk_norm", True, False, "norms"),
    ("use_qk_norm", True, False, "norms"),
    ("qk_layernorm", True, False, "norms"),
    ("o_gate", True, False, "gates on the output"),
    ("use_output_gate", True, False, "gates on the output"),
    ("attn_use_output_gate", True, False, "gates on the output"),
    ("attnres_block_size", 4, None, "residuals"),
    ("nosa_config", {"topk": 3}, None, "NOSA"),
    ("locality_config", {"topk": 3}, None, "NOSA"),
    ("num_nextn_predict_layers", 1, 0, "MTP"),
    ("num_mtp_layers", 2, 0, "MTP"),
    ("num_experts", 8, 0, "mixture of experts"),
    ("num_local_experts", 8, 0, "mixture of experts"),
    ("attn_logit_softcapping", 50.0, None, "caps"),
    ("final_logit_softcapping", 30.0, None, "caps"),
    ("logit_softcap", 30.0, None, "caps"),
    ("logits_soft_cap", 30.0, None, "caps"),
    ("clip_qkv", 8, None, "caps"),
    ("embedding_multiplier", 12.0, 1.0, "scales"),
    ("residual_multiplier", 0.2, 1.0, "scales"),
    ("logits_scaling", 8.0, 1, "scales"),
    ("logit_scale", 0.1, 1.0, "scales"),
    ("attention_multiplier", 0.01, None, "head_dim"),
    ("query_pre_attn_scalar", 256, None, "head_dim"),
    ("parallel_attn", True, False, "one after the other"),
    ("use_parallel_residual", True, False, "one after the other"),
    ("is_encoder_decoder", True, False, "decoders"),
    ("vision_config", {"depth": 3}, None, "text"),
    ("audio_config", {"depth": 3}, None, "text"),
    ("partial_rotary_factor", 0.5, 1.0, "must be 1.0"),
    ("hidden_act", "gelu", "silu", "silu"),
    ("architectures", ["MiniCPMSALAForCausalLM"], ["Other"], "linear attention"),
    ("architectures", ["NOSAForCausalLM"], [], "NOSA"),
    ("architectures", ["LlamaNSAForSequenceClassification"], [], "language models"),
    ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "default"}, "dynamic"),
    ("rope_scaling", {"type": "default", "mrope_section": [1]}, {"type": "default"}, "mrope"),
]
# Fields that some families compute.
ONLY_SOME = {
    "n_routed_experts": ({"nsa_moe"}, 8, 0, "mixture of experts"),
    "moe_intermediate_size": ({"nsa_moe"}, 32, None, "mixture of experts"),
    "scale_emb": ({"minicpm"}, 12, 1, "scales"),
    "scale_depth": ({"minicpm"}, 1.4, 1.0, "scales"),
    "dim_model_base": ({"minicpm"}, 256, None, "scales"),
}


def test_every_rule_is_here() -> None:
    assert set(_RULES) <= {name for name, *_ in EVERYWHERE} | set(ONLY_SOME)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "used", "unused", "reason"), EVERYWHERE)
def test_what_no_family_computes(
    tmp_path: Path, family: str, name: str, used: Any, unused: Any, reason: str
) -> None:
    raw = FAMILIES[family]
    with pytest.raises(ModelError) as caught:
        load(tmp_path, raw, **{name: used})
    said = str(caught.value)
    assert name in said or name.replace("_", " ") in said
    assert reason in said
    assert load(tmp_path, raw, **{name: unused}).family == family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ONLY_SOME)
def test_what_other_families_compute(tmp_path: Path, family: str, name: str) -> None:
    families, used, unused, reason = ONLY_SOME[name]
    raw = FAMILIES[family]
    if family in families:
        assert load(tmp_path, raw, **{name: used}).family == family
        return
    with pytest.raises(ModelError, match=f"{name} .*{reason}"):
        load(tmp_path, raw, **{name: used})
    load(tmp_path, raw, **{name: unused})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_only_training_reads_is_ignored(tmp_path: Path, family: str) -> None:
    plain = load(tmp_path, FAMILIES[family])
    ignored = {
        "attention_dropout": 0.1,
        "initializer_range": 0.5,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "pretraining_tp": 2,
        "use_cache": False,
        "mup_denominator": 7,
        "sliding_window": 4096,
        "use_sliding_window": False,
    }
    assert load(tmp_path, FAMILIES[family], **ignored) == plain


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' .* expected 'softmax'"),
        ({"topk_method": "group_limited_greedy"}, "topk_method .* expected 'greedy'"),
        ({"norm_topk_prob": True}, "norm_topk_prob True .* expected False"),
        ({"n_group": 8}, "n_group 8 .* expected 1"),
        ({"topk_group": 3}, "topk_group 3 .* expected 1"),
        ({"routed_scaling_factor": 16.0}, r"routed_scaling_factor 16\.0 .* expected 1"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2 .* expected 1"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than n_routed_experts 6"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace 4 is more than num_hidden_layers 3"),
        ({"moe_intermediate_size": None}, "lacks moe_intermediate_size"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: "),
        ({"kv_per_branch": 1}, "kv_per_branch: "),
        ({"nsa": {"gate": "softmax"}}, "gate must be 'linear', 'mlp' or 'constant'"),
        (
            {"nsa": {"lse_len": 128, "lse_stride": 64, "score_map": "max_pool"}},
            "set kv_per_branch to false",
        ),
    ],
)
def test_nsa_moe_refusals(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load(tmp_path, NSA_MOE, **changes)


def test_deepseek_fields_that_say_what_is_computed(tmp_path: Path) -> None:
    fields = {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "moe_layer_freq": 1,
    }
    assert load(tmp_path, NSA_MOE, **fields) == load(tmp_path, NSA_MOE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale_depth": None}, "must have scale_emb, scale_depth and dim_model_base"),
        ({"scale_emb": None}, "must have scale_emb"),
        ({"scale_emb": 0}, "scale_emb: "),
        ({"use_mup": False}, "use_mup false"),
        ({"sparse_config": {**SPARSE_CONFIG, "use_nope": True}}, "use_nope true"),
        ({"sparse_config": {**SPARSE_CONFIG, "locality": 3}}, "has locality.*NOSA"),
        ({"sparse_config": {**SPARSE_CONFIG, "topk": "64"}}, "topk must be a count, got '64'"),
        ({"sparse_config": {**SPARSE_CONFIG, "topk": True}}, "topk must be a count, got True"),
        ({"sparse_config": {**SPARSE_CONFIG, "use_nope": 0}}, "use_nope must be a boolean"),
        ({"sparse_config": {**SPARSE_CONFIG, "window_size": 100}}, "multiple of block_size"),
        ({"sparse_config": {**SPARSE_CONFIG, "window_size": 0}}, "multiple of block_size"),
        ({"sparse_config": {**SPARSE_CONFIG, "kernel_stride": 5}}, "cmp_stride must divide"),
        ({"sparse_config": [1]}, "sparse_config: "),
        ({"head_dim": 64}, "rope_scaling.short_factor must have 32 numbers"),
    ],
)
def test_minicpm_refusals(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load(tmp_path, MINICPM4_8B, **changes)


def test_a_sparse_config_is_for_minicpm(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="unknown fields: sparse_config"):
        load(tmp_path, LLAMA, nsa={"sparse_config": SPARSE_CONFIG})
    with pytest.raises(ModelError, match="itself an object, got 3"):
        load(tmp_path, MINICPM4_8B, nsa={"sparse_config": 3})


def test_other_projects_use_the_name_of_fla(tmp_path: Path) -> None:
    """seconds-0/nsa-117m-byte: the architecture string of fla, and none of its fields."""
    raw = {
        "model_type": "nsa",
        "architectures": ["NSAForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_nsa.NSAForCausalLM"},
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "vocab_size": 256,
        "n_kv_groups": 2,
        "l": 32,
        "d": 16,
        "l_sel": 64,
        "n_sel": 16,
        "w": 512,
    }
    with pytest.raises(ModelError, match=r"flash-linear-attention.*nsa-117m-byte"):
        load(tmp_path, raw)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"rope_type": "yarn", "factor": 0}, "factor must be a number above 0"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 2048}, "'yarn' lacks factor"),
        ({"rope_type": "yarn", "factor": 2, "truncate": False}, "truncate false"),
        ({"rope_type": "yarn", "factor": 2, "beta_fast": 1}, "beta_fast must be more than"),
        ({"rope_type": "yarn", "factor": 2, "beta": 1}, "'yarn' has beta, which may change"),
        ({"rope_type": "yarn", "factor": True}, "factor must be a number above 0, got True"),
        (
            {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 10.5},
            "must be a count of tokens",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            "lacks original_max_position_embeddings",
        ),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [1.0] * 7,
                "original_max_position_embeddings": 512,
            },
            "long_factor must have 8 numbers, .* got 7",
        ),
        (
            {
                "rope_type": "longrope",
                "short_factor": [0] * 8,
                "long_factor": 3,
                "original_max_position_embeddings": 512,
            },
            "short_factor must be a number above 0",
        ),
    ],
)
def test_rope_refusals(tmp_path: Path, section: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load(tmp_path, LLAMA, rope_scaling=section, max_position_embeddings=2048)


def test_a_message_is_short(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(tmp_path, LLAMA_NSA, mixer_types=["lightning"] * 1000)
    assert len(str(caught.value)) < 300
