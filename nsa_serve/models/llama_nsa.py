"""The `llama-nsa` family (zen-E/NSA-1B): Llama's config and weight names, and a g_proj a layer.

Compression is a mean with l = d = l' = block_size; only the query's own block is forced. The
kernel it was published with keeps the running top-k in a register array of block_size entries and
merges half of the past with half of each new chunk. That is the exact top-n when the count is at
most half of block_size, and the half-and-half rule `fla_legacy` when it is all of it.

Its siblings have the same config.json and weights, but not the same model code
(github.com/zhenyi4/ssa, configs/): SSA and MoBA add up the slc branch alone, FullAttn attends to
everything, weighed by slc's gate. So somebody has to say which it is: --nsa-dialect.
"""

from collections.abc import Mapping
from typing import Any, Literal

from nsa_serve.config import ModelConfig, NSAConfig, NSADialect
from nsa_serve.errors import ModelError
from nsa_serve.models.config_file import NonNegativeInt, PositiveInt, make_nsa_config, parse_fields
from nsa_serve.models.native import LlamaFields
from nsa_serve.models.shape import next_power_of_2


class LlamaNSAFields(LlamaFields):
    """config.json of model_type `llama-nsa`."""

    block_size: PositiveInt
    block_counts: PositiveInt
    window_size: NonNegativeInt
    inference_mode: Literal["sparse", "full"] | None = None


def read_llama_nsa(
    raw: Mapping[str, Any], *, nsa: NSAConfig | None, dialect: NSADialect | None = None
) -> ModelConfig:
    """Read config.json of a `llama-nsa` checkpoint; `nsa` replaces the dialect it describes.

    dialect: which of the family's models it is, where the file does not say.

    Raises ModelError when a field is missing or wrong, or when the file may be that of a sibling
    and no dialect is given.
    """
    fields = parse_fields(LlamaNSAFields, raw)
    if nsa is None:
        nsa = _make_dialect(fields, dialect or _only_dialect(fields))
    return fields.model(family="llama-nsa", nsa=nsa)


def _only_dialect(fields: LlamaNSAFields) -> NSADialect:
    """Return what the file can only be. Raises ModelError when it can be several."""
    if fields.window_size and fields.inference_mode is None:
        return "nsa"
    found = "window_size 0" if fields.window_size == 0 else "inference_mode"
    raise ModelError(
        f"this llama-nsa config.json has {found}, as those of SSA-1B, MoBA-1B and FullAttn-1B "
        "have: they share model_type and weights but do not compute three-branch NSA, and "
        "nothing in the file tells which. Say it with --nsa-dialect ssa, moba, full or nsa, or "
        "describe the attention with --nsa-config"
    )


def _make_dialect(fields: LlamaNSAFields, dialect: NSADialect) -> NSAConfig:
    # Only SSA's code reads inference_mode.
    is_full = fields.inference_mode == "full"
    if dialect == "nsa" and is_full:
        raise ModelError(
            "inference_mode 'full' (dense attention) is a mode of SSA: --nsa-dialect ssa or full"
        )
    if dialect == "full" or (dialect == "ssa" and is_full):
        return make_nsa_config(
            **_compression(fields.block_size),
            # A window as long as the longest context, weighed by slc's gate.
            window_size=fields.max_position_embeddings,
            branches=("swa",),
            window_gate="slc",
        )
    if dialect == "nsa":
        return make_nsa_config(**_selection(fields), window_size=fields.window_size)
    return make_nsa_config(**_selection(fields), window_size=0, branches=("slc",))


def _compression(block_size: int) -> dict[str, Any]:
    return {"cmp_len": block_size, "cmp_stride": block_size, "block_size": block_size}


def _selection(fields: LlamaNSAFields) -> dict[str, Any]:
    """Return compression and selection, which the siblings share."""
    block_size, num_selected_blocks = fields.block_size, next_power_of_2(fields.block_counts)
    is_exact = 2 * num_selected_blocks <= block_size
    if not is_exact and num_selected_blocks != block_size:
        raise ModelError(
            f"block_counts {fields.block_counts} with block_size {block_size} is nothing that the "
            "published kernel selects: expected at most block_size / 2, or block_size; describe "
            "the selection with --nsa-config"
        )
    return {
        **_compression(block_size),
        "num_selected_blocks": num_selected_blocks,
        "num_init_blocks": 0,
        "num_local_blocks": 1,
        "selection": "exact" if is_exact else "fla_legacy",
    }
