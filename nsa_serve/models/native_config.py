"""The other way round: a `ModelConfig` as the config.json of a family of ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nsa_serve.config import ModelConfig, NSAConfig


def native_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json, model_type "llama" with an `nsa` section, that reads as `config`.

    What the native format has no field for is left out: compare what is read back.
    """
    fields: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "v_head_dim": config.v_head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "torch_dtype": config.checkpoint_dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _one_or_list(config.eos_token_ids),
        "nsa": nsa_section(config.nsa),
    }
    if config.rope_scaling.rope_type != "default":
        fields["rope_scaling"] = _plain(config.rope_scaling)
    return fields


def nsa_moe_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of model_type `nsa_moe` that reads as `config`, as far as it can."""
    fields = {
        **native_config(config),
        "architectures": ["NSAMoEForCausalLM"],
        "model_type": "nsa_moe",
        "kv_per_branch": config.kv_per_branch,
    }
    if config.moe is not None:
        fields |= {
            "n_routed_experts": config.moe.num_experts,
            "n_shared_experts": config.moe.num_shared_experts,
            "num_experts_per_tok": config.moe.num_experts_per_token,
            "moe_intermediate_size": config.moe.expert_intermediate_size,
            "first_k_dense_replace": config.moe.num_dense_layers,
        }
    return fields


def nsa_section(nsa: NSAConfig) -> dict[str, Any]:
    """Return the `nsa` section that reads as `nsa`, with every field named."""
    return _plain(nsa)


def _plain(value: Any) -> dict[str, Any]:
    """Return a dataclass as JSON has it: lists for tuples, and no field that is None."""
    items: Mapping[str, Any] = dataclasses.asdict(value)
    return {
        name: list(item) if isinstance(item, tuple) else item
        for name, item in items.items()
        if item is not None
    }


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    if len(ids) == 1:
        return ids[0]
    return list(ids) or None
