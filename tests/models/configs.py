"""config.json of each family as published or documented, for tests that change a field."""

import json
from pathlib import Path
from typing import Any

from nsa_serve.config import ModelConfig
from nsa_serve.model_source import ModelSource
from nsa_serve.models.families import load_model_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "vocab_size": 301,
    "nsa": {"gate": "constant", "gate_constant": [0, 1, 0]},
}
FLA: dict[str, Any] = {
    "model_type": "nsa",
    "architectures": ["NSAForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "vocab_size": 300,
    "block_size": 64,
    "block_counts": 16,
    "window_size": 512,
}
LLAMA_NSA: dict[str, Any] = {
    "model_type": "llama-nsa",
    "architectures": ["LlamaNSAForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 300,
    "block_size": 16,
    "block_counts": 16,
    "window_size": 128,
}
NSA_MOE: dict[str, Any] = {
    "model_type": "nsa_moe",
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "v_head_dim": 16,
    "kv_per_branch": True,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "max_position_embeddings": 2048,
    "nsa": {"compression": "mlp", "gate": "mlp", "gate_hidden_size": 40},
}
# openbmb/MiniCPM4-8B, whose sparse_config is what its model card tells to add.
SPARSE_CONFIG = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}
MINICPM4_8B: dict[str, Any] = {
    "model_type": "minicpm",
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
    "bos_token_id": 1,
    "eos_token_id": [2, 73440],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.1,
    "intermediate_size": 16384,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "rope_type": "longrope",
        "long_factor": [1.0 + i / 64 for i in range(64)],
        "short_factor": [1.0 + i / 128 for i in range(64)],
        "original_max_position_embeddings": 32768,
    },
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 73448,
    "scale_emb": 12,
    "dim_model_base": 256,
    "scale_depth": 1.4,
    "mup_denominator": 32,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "sparse_config": SPARSE_CONFIG,
}
FAMILIES = {
    "llama": LLAMA,
    "nsa": FLA,
    "llama-nsa": LLAMA_NSA,
    "nsa_moe": NSA_MOE,
    "minicpm": MINICPM4_8B,
}


def load(
    folder: Path, raw: dict[str, Any], *, nsa: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    """Read `raw` with `changes` as the config.json of a folder; None leaves a field out."""
    fields = {name: value for name, value in {**raw, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    return load_model_config(ModelSource(name="test", folder=folder, nsa_section=nsa))
