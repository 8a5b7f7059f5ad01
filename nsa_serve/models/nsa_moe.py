"""The `nsa_moe` family: the architecture of the NSA paper (arXiv 2502.11089, sections 1.2 and 3).

Keys and values of its own for every branch, compression and gates by MLPs, and DeepSeekMoE
(arXiv 2401.06066) or dense feed-forward layers. Fields of attention are spelled as in `NSAConfig`,
those of experts as DeepSeek spells them.
"""

from collections.abc import Mapping
from typing import Any

from nsa_serve.config import ModelConfig, MoEConfig, NSAConfig
from nsa_serve.errors import ModelError
from nsa_serve.models.config_file import (
    NonNegativeInt,
    PositiveInt,
    parse_fields,
    read_nsa_section,
)
from nsa_serve.models.native import LlamaFields

# DeepSeek's routing fields, and the value of each that is computed here.
_ROUTING: Mapping[str, tuple[Any, ...]] = {
    "scoring_func": ("softmax",),
    "topk_method": ("greedy",),
    "norm_topk_prob": (False,),
    "n_group": (1, 0),
    "topk_group": (1, 0),
    "routed_scaling_factor": (1, 1.0),
    "moe_layer_freq": (1,),
    "ep_size": (1,),
}


class NSAMoEFields(LlamaFields):
    """config.json of model_type `nsa_moe`."""

    kv_per_branch: bool = True
    n_routed_experts: NonNegativeInt | None = None
    n_shared_experts: NonNegativeInt | None = None
    num_experts_per_tok: PositiveInt | None = None
    moe_intermediate_size: PositiveInt | None = None
    first_k_dense_replace: NonNegativeInt = 0


def read_nsa_moe(raw: Mapping[str, Any], *, nsa: NSAConfig | None) -> ModelConfig:
    """Read config.json of an `nsa_moe` checkpoint; `nsa` replaces its `nsa` section.

    Raises ModelError when a field is missing or wrong, or asks for a routing that is not computed.
    """
    fields = parse_fields(NSAMoEFields, raw)
    if nsa is None:
        if raw.get("nsa") is None:
            raise ModelError(
                "config.json of an nsa_moe model has no `nsa` section, which says what its "
                "attention is; docs/models.md has every field"
            )
        nsa = read_nsa_section(raw["nsa"])
    if nsa.lse_len and fields.kv_per_branch:
        raise ModelError(
            "nsa.lse_len (InfLLM-v2) needs keys that the branches share: set kv_per_branch to false"
        )
    return fields.model(
        family="nsa_moe",
        nsa=nsa,
        kv_per_branch=fields.kv_per_branch,
        moe=_read_moe(fields, raw),
    )


def _read_moe(fields: NSAMoEFields, raw: Mapping[str, Any]) -> MoEConfig | None:
    """Return the experts, None for dense layers throughout."""
    if not fields.n_routed_experts:
        return None
    for name, computed in _ROUTING.items():
        value = raw.get(name)
        if value is not None and value not in computed:
            raise ModelError(
                f"config.json: {name} {value!r} is not supported: experts are the "
                "num_experts_per_tok largest of a softmax over all, weighted by it as it is; "
                f"expected {computed[0]!r}"
            )
    missing = [
        name
        for name in ("num_experts_per_tok", "moe_intermediate_size")
        if getattr(fields, name) is None
    ]
    if missing:
        raise ModelError(
            f"config.json has n_routed_experts {fields.n_routed_experts} but lacks "
            f"{', '.join(missing)}"
        )
    assert fields.num_experts_per_tok is not None and fields.moe_intermediate_size is not None
    if fields.num_experts_per_tok > fields.n_routed_experts:
        raise ModelError(
            f"num_experts_per_tok {fields.num_experts_per_tok} is more than n_routed_experts "
            f"{fields.n_routed_experts}"
        )
    if fields.first_k_dense_replace > fields.num_hidden_layers:
        raise ModelError(
            f"first_k_dense_replace {fields.first_k_dense_replace} is more than num_hidden_layers "
            f"{fields.num_hidden_layers}"
        )
    return MoEConfig(
        num_experts=fields.n_routed_experts,
        num_experts_per_token=fields.num_experts_per_tok,
        num_shared_experts=fields.n_shared_experts or 0,
        expert_intermediate_size=fields.moe_intermediate_size,
        num_dense_layers=fields.first_k_dense_replace,
    )
