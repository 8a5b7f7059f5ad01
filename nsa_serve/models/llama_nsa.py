"""The `llama-nsa` family (zen-E/NSA-1B): Llama's config and weight names, and a g_proj a layer.

Compression is a mean with l = d = l' = block_size; only the query's own block is forced. The
kernel it was published with keeps the running top-k in a register array of block_size entries and
merges half of the past with half of each new chunk. That is the exact top-n when the count is at
most half of block_size, and the half-and-half rule `fla_legacy` when it is all of it.
"""

from collections.abc import Mapping
from typing import Any

from nsa_serve.config import ModelConfig, NSAConfig
from nsa_serve.errors import ModelError
from nsa_serve.models.config_file import NonNegativeInt, PositiveInt, make_nsa_config, parse_fields
from nsa_serve.models.native import LlamaFields
from nsa_serve.models.shape import next_power_of_2


class LlamaNSAFields(LlamaFields):
    """config.json of model_type `llama-nsa`."""

    block_size: PositiveInt
    block_counts: PositiveInt
    window_size: NonNegativeInt
    inference_mode: str | None = None


def read_llama_nsa(raw: Mapping[str, Any], *, nsa: NSAConfig | None) -> ModelConfig:
    """Read config.json of a `llama-nsa` checkpoint; `nsa` replaces the dialect it describes.

    Raises ModelError when a field is missing or wrong, or when the file looks like one of the
    family's siblings that share its name and weights but compute something else.
    """
    fields = parse_fields(LlamaNSAFields, raw)
    if nsa is None:
        nsa = _dialect(fields)
    return fields.model(family="llama-nsa", nsa=nsa)


def _dialect(fields: LlamaNSAFields) -> NSAConfig:
    if fields.window_size == 0 or fields.inference_mode is not None:
        raise ModelError(
            "this llama-nsa config.json has window_size 0 or inference_mode, as those of SSA, MoBA "
            "and FullAttn have, which compute something other than three-branch NSA; to serve it "
            "as NSA, describe its attention with --nsa-config"
        )
    block_size, num_selected_blocks = fields.block_size, next_power_of_2(fields.block_counts)
    is_exact = 2 * num_selected_blocks <= block_size
    if not is_exact and num_selected_blocks != block_size:
        raise ModelError(
            f"block_counts {fields.block_counts} with block_size {block_size} is nothing that the "
            "published kernel selects: expected at most block_size / 2, or block_size; describe "
            "the selection with --nsa-config"
        )
    return make_nsa_config(
        cmp_len=block_size,
        cmp_stride=block_size,
        block_size=block_size,
        num_selected_blocks=num_selected_blocks,
        num_init_blocks=0,
        num_local_blocks=1,
        window_size=fields.window_size,
        selection="exact" if is_exact else "fla_legacy",
    )
