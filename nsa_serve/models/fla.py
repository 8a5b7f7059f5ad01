"""The `nsa` family: checkpoints of flash-linear-attention's NSAForCausalLM.

Compression is a mean with l = d = l' = block_size over K and V that all branches share; blocks
0, last - 1 and last are forced; block_counts acts as if rounded up to a power of two. Field names
and defaults are those of fla's NSAConfig.
"""

import logging
from collections.abc import Mapping
from typing import Any

from nsa_serve.config import ModelConfig, NSAConfig
from nsa_serve.errors import ModelError
from nsa_serve.models.config_file import (
    CheckpointFields,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    make_nsa_config,
    parse_fields,
)
from nsa_serve.models.shape import fla_intermediate_size, next_power_of_2

logger = logging.getLogger(__name__)

# Canonical name part -> fla's; applied in this order.
_NAMES = (
    ("model.embed_tokens.", "model.embeddings."),
    (".self_attn.", ".attn."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".mlp_norm."),
)

# By which a config of fla is told from others of the same name.
_OWN_FIELDS = ("num_heads", "block_size", "block_counts", "window_size")


class FlaFields(CheckpointFields):
    """config.json of model_type `nsa`."""

    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    head_dim: PositiveInt = 32
    hidden_ratio: PositiveInt | None = 4
    intermediate_size: PositiveInt | None = None
    norm_eps: PositiveFloat = 1e-6
    elementwise_affine: bool = True
    qkv_bias: bool = False
    block_size: PositiveInt
    block_counts: PositiveInt
    window_size: NonNegativeInt


def fla_name(canonical: str) -> str:
    """Return fla's name of a weight."""
    for ours, theirs in _NAMES:
        canonical = canonical.replace(ours, theirs)
    return canonical


def read_fla(
    raw: Mapping[str, Any],
    *,
    nsa: NSAConfig | None,
    weight_shapes: Mapping[str, tuple[int, ...]],
) -> ModelConfig:
    """Read config.json of an fla checkpoint; `nsa` replaces the dialect it describes.

    `weight_shapes` (by fla's names, may be empty) correct head_dim: code before December 2025
    ignored the field and used 64.
    Raises ModelError when a field is missing, wrong or of a variant that is not supported.
    """
    missing = [name for name in _OWN_FIELDS if name not in raw]
    if len(missing) == len(_OWN_FIELDS):
        raise ModelError(
            f"config.json lacks {', '.join(missing)}, which every config of flash-linear-attention "
            "has: other projects use model_type 'nsa' and architecture 'NSAForCausalLM' too "
            "(nsa-117m-byte), and their models are not supported"
        )
    fields = parse_fields(FlaFields, raw)
    if not fields.elementwise_affine:
        raise ModelError("elementwise_affine false (norms without weights) is not supported")
    head_dim = _head_dim(fields, weight_shapes)
    return ModelConfig(
        **fields.common(),
        family="nsa",
        nsa=nsa or _dialect(fields),
        num_q_heads=fields.num_heads,
        num_kv_heads=fields.num_kv_heads or fields.num_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        intermediate_size=fields.intermediate_size
        or fla_intermediate_size(fields.hidden_size, fields.hidden_ratio or 4),
        rms_norm_eps=fields.norm_eps,
        attention_bias=fields.qkv_bias,
    )


def _head_dim(fields: FlaFields, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """head_dim of the config, unless both projections agree on another one."""
    num_kv_heads = fields.num_kv_heads or fields.num_heads
    q_shape = shapes.get("model.layers.0.attn.q_proj.weight")
    k_shape = shapes.get("model.layers.0.attn.k_proj.weight")
    if not q_shape or not k_shape or q_shape[0] == fields.num_heads * fields.head_dim:
        return fields.head_dim
    inferred = max(1, q_shape[0] // fields.num_heads)
    if q_shape[0] != inferred * fields.num_heads or k_shape[0] != inferred * num_kv_heads:
        raise ModelError(
            f"config.json says head_dim {fields.head_dim} with {fields.num_heads} query and "
            f"{num_kv_heads} KV heads, but q_proj has {q_shape[0]} rows and k_proj {k_shape[0]}; "
            "no head_dim fits both"
        )
    logger.warning(
        "config.json says head_dim %d, but q_proj and k_proj were made with %d, as early versions "
        "of fla did; using %d",
        fields.head_dim,
        inferred,
        inferred,
    )
    return inferred


def _dialect(fields: FlaFields) -> NSAConfig:
    block_size, num_selected_blocks = fields.block_size, next_power_of_2(fields.block_counts)
    if 2 * num_selected_blocks > block_size:
        raise ModelError(
            f"block_counts {fields.block_counts} with block_size {block_size} is refused by fla, "
            "whose top-k is exact only up to block_size / 2; describe the selection of this "
            "checkpoint with --nsa-config"
        )
    return make_nsa_config(
        cmp_len=block_size,
        cmp_stride=block_size,
        block_size=block_size,
        num_selected_blocks=num_selected_blocks,
        num_init_blocks=1,
        num_local_blocks=2,
        window_size=fields.window_size,
    )
