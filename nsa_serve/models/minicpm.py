"""The `minicpm` family: MiniCPM4 and 4.1, with InfLLM-v2 attention (arXiv 2506.07900) or dense.

Weight names are Llama's. Blocks are scored by compressed keys, and one attention over the selected
ones is all: no compressed values, no gates, no window of its own. muP scales embeddings, residual
branches and logits.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nsa_serve.config import ModelConfig, NSAConfig, RopeScaling
from nsa_serve.errors import ModelError
from nsa_serve.models.config_file import PositiveFloat, PositiveInt, make_nsa_config, parse_fields
from nsa_serve.models.native import LlamaFields

logger = logging.getLogger(__name__)

# Fields of `sparse_config` with the defaults of the published code.
_SPARSE_DEFAULTS: Mapping[str, int | bool] = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "dense_len": 8192,
    "use_nope": False,
    "topk_includes_local": False,
}
# Windows whose keys normalise the scores, in lengths and strides of the scored ones.
_COARSE = 4


class MiniCPMFields(LlamaFields):
    """config.json of model_type `minicpm`; defaults are those of the published configuration.

    mup_denominator is that of heads for speculative decoding, and not read.
    """

    scale_emb: PositiveFloat = 1.0
    scale_depth: PositiveFloat = 1.0
    dim_model_base: PositiveInt = 1
    use_mup: bool = True
    tie_word_embeddings: bool = True
    sparse_config: dict[str, Any] | None = None


def read_minicpm(
    raw: Mapping[str, Any], *, nsa: NSAConfig | None, sparse: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Read config.json of a MiniCPM4 checkpoint.

    nsa: replaces the dialect that it describes; sparse: its `sparse_config`. Without any of them
    the model is dense, as its authors' code then is.

    Raises ModelError when a field is missing, wrong or of a variant that is not supported.
    """
    fields = parse_fields(MiniCPMFields, raw)
    if "dim_model_base" not in raw or "scale_depth" not in raw or "scale_emb" not in raw:
        raise ModelError(
            "config.json of a minicpm model must have scale_emb, scale_depth and dim_model_base, "
            "which scale embeddings, layers and logits"
        )
    if not fields.use_mup:
        raise ModelError("config.json: use_mup false is not supported: MiniCPM4 is scaled by muP")
    if sparse is None:
        sparse = fields.sparse_config
    if nsa is None:
        nsa = _dense(fields.max_position_embeddings) if sparse is None else _infllm(sparse)
    if nsa.gate != "constant" or nsa.compression != "mean":
        raise ModelError(
            "a minicpm checkpoint holds no gate or compression weights: its nsa section needs "
            f'"gate": "constant" and "compression": "mean", got {nsa.gate!r} and '
            f"{nsa.compression!r}"
        )
    config = fields.model(
        family="minicpm",
        nsa=nsa,
        embedding_scale=fields.scale_emb,
        residual_scale=fields.scale_depth / math.sqrt(fields.num_hidden_layers),
        logit_scale=fields.dim_model_base / fields.hidden_size,
    )
    return replace(config, rope_scaling=_rope_scaling(config))


def read_sparse_config(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `sparse_config` that --nsa-config gave. Raises ModelError if it is no object."""
    sparse = section["sparse_config"]
    if not isinstance(sparse, Mapping) or len(section) > 1:
        raise ModelError(
            "--nsa-config for a minicpm model must be an `nsa` section or an object with "
            f"`sparse_config`, itself an object, got {sparse!r}"
        )
    return sparse


def _dense(max_position_embeddings: int) -> NSAConfig:
    logger.warning(
        "config.json has no sparse_config, so attention is dense, as in the model's own code; for "
        "InfLLM-v2 add one, or give it with --nsa-config (docs/models.md)"
    )
    return make_nsa_config(
        # A window as long as the longest context.
        window_size=max_position_embeddings,
        gate="constant",
        gate_constant=(0.0, 0.0, 1.0),
        branches=("swa",),
    )


def _infllm(sparse: Mapping[str, Any]) -> NSAConfig:
    values = {**_SPARSE_DEFAULTS, **sparse}
    unknown = sorted(values.keys() - _SPARSE_DEFAULTS.keys())
    if unknown:
        raise ModelError(
            f"sparse_config has {', '.join(unknown)}, which is not supported (MiniCPM-SALA and "
            f"NOSA compute something else); known are {', '.join(_SPARSE_DEFAULTS)}"
        )
    for name, default in _SPARSE_DEFAULTS.items():
        value = values[name]
        if type(value) is not type(default) or value < 0:
            kind = "a boolean" if isinstance(default, bool) else "a count"
            raise ModelError(f"sparse_config.{name} must be {kind}, got {value!r}")
    if values["use_nope"]:
        raise ModelError(
            "sparse_config.use_nope true is not supported: blocks are scored by rotated keys only"
        )
    block_size, window_size = values["block_size"], values["window_size"]
    if not block_size or window_size < block_size or window_size % block_size:
        raise ModelError(
            f"sparse_config.window_size must be a multiple of block_size, at least one, got "
            f"{window_size} and {block_size}"
        )
    num_local_blocks = window_size // block_size
    return make_nsa_config(
        cmp_len=values["kernel_size"],
        cmp_stride=values["kernel_stride"],
        block_size=block_size,
        # The last published code adds the local blocks. Older code may not, and no file tells.
        num_selected_blocks=values["topk"]
        + (0 if values["topk_includes_local"] else num_local_blocks),
        num_init_blocks=values["init_blocks"],
        num_local_blocks=num_local_blocks,
        window_size=0,
        score_map="max_pool",
        gate="constant",
        gate_constant=(0.0, 1.0, 0.0),
        branches=("slc",),
        dense_len=values["dense_len"],
        lse_len=_COARSE * values["kernel_size"],
        lse_stride=_COARSE * values["kernel_stride"],
    )


def _rope_scaling(config: ModelConfig) -> RopeScaling:
    """Return the scaling with the temperature of the published code.

    That is sqrt(1 + ln(s) / ln(old context)), s being the ratio of the two contexts, whatever
    `factor` says.
    """
    scaling = config.rope_scaling
    if scaling.rope_type != "longrope":
        return scaling
    old_context = scaling.original_max_position_embeddings
    ratio = config.max_position_embeddings / old_context
    square = 1 + math.log(ratio) / math.log(old_context)
    if square <= 0:
        raise ModelError(
            f"rope_scaling.original_max_position_embeddings {old_context} does not fit "
            f"max_position_embeddings {config.max_position_embeddings}"
        )
    return replace(scaling, factor=ratio, attention_factor=math.sqrt(square))
