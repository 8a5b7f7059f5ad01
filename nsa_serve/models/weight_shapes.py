"""Every weight that a model has: its canonical name and shape. No torch.

Canonical names are Llama's, and those of the native format (docs/models.md). Legend: HQ/H query
and KV heads, D head_dim, Dv v_head_dim, l cmp_len.
"""

import math
from collections.abc import Iterable

from nsa_serve.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
KV_BRANCHES = ("slc", "cmp", "swa")
"""Of keys and values where every branch has its own, in the order of the fused matrix."""


def expected_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the canonical name and shape of every weight that a model of this config has."""
    hidden = config.hidden_size
    weights: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = (hidden,)
        for name, shape in _attention_weights(config).items():
            weights[f"{prefix}self_attn.{name}"] = shape
        weights[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, shape in _feed_forward_weights(config, layer).items():
            weights[f"{prefix}mlp.{name}"] = shape
    weights[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        weights[LM_HEAD] = (config.vocab_size, hidden)
    return weights


def num_parameters(config: ModelConfig) -> int:
    """Return how many numbers a model of this config has; tied weights count once."""
    return sum(math.prod(shape) for shape in expected_weights(config).values())


def _attention_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, nsa = config.hidden_size, config.nsa
    q_size, o_size = (config.num_q_heads * dim for dim in (config.head_dim, config.v_head_dim))
    k_size, v_size = (config.num_kv_heads * dim for dim in (config.head_dim, config.v_head_dim))
    has_bias = config.attention_bias
    branches = [f"_{branch}" for branch in KV_BRANCHES] if config.kv_per_branch else [""]
    projections = [
        ("q_proj", q_size, hidden, has_bias),
        *((f"k{branch}_proj", k_size, hidden, has_bias) for branch in branches),
        *((f"v{branch}_proj", v_size, hidden, has_bias) for branch in branches),
        ("o_proj", hidden, o_size, config.attention_out_bias),
    ]
    # Rows of gates are (head, branch), branch fastest, in the order cmp, slc, swa.
    if nsa.gate == "linear":
        projections.append(("g_proj", 3 * config.num_q_heads, hidden, nsa.gate_bias))
    elif nsa.gate == "mlp":
        projections.append(("gate.fc1", nsa.gate_hidden_size, hidden, True))
        projections.append(("gate.fc2", 3 * config.num_q_heads, nsa.gate_hidden_size, True))
    weights = _linears(projections)
    if nsa.compression == "mlp":
        for name, dim in (("cmp_k", config.head_dim), ("cmp_v", config.v_head_dim)):
            weights[f"{name}.pos"] = (nsa.cmp_len, dim)
            layers = (
                (f"{name}.fc1", nsa.cmp_hidden_size, nsa.cmp_len * dim, True),
                (f"{name}.fc2", dim, nsa.cmp_hidden_size, True),
            )
            weights.update(_linears(layers))
    return weights


def _feed_forward_weights(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    moe, hidden = config.moe, config.hidden_size
    if moe is None or layer < moe.num_dense_layers:
        return _mlp_weights("", hidden, config.intermediate_size, config.mlp_bias)
    weights: dict[str, tuple[int, ...]] = {"router.weight": (moe.num_experts, hidden)}
    width = moe.expert_intermediate_size
    for expert in range(moe.num_experts):
        weights |= _mlp_weights(f"experts.{expert}.", hidden, width, False)
    if moe.num_shared_experts:
        weights |= _mlp_weights("shared_experts.", hidden, moe.num_shared_experts * width, False)
    return weights


def _mlp_weights(
    prefix: str, hidden: int, width: int, has_bias: bool
) -> dict[str, tuple[int, ...]]:
    return _linears(
        (
            (f"{prefix}gate_proj", width, hidden, has_bias),
            (f"{prefix}up_proj", width, hidden, has_bias),
            (f"{prefix}down_proj", hidden, width, has_bias),
        )
    )


def _linears(layers: Iterable[tuple[str, int, int, bool]]) -> dict[str, tuple[int, ...]]:
    weights: dict[str, tuple[int, ...]] = {}
    for name, rows, columns, has_bias in layers:
        weights[f"{name}.weight"] = (rows, columns)
        if has_bias:
            weights[f"{name}.bias"] = (rows,)
    return weights
