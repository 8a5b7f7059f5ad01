"""The native format: a Llama checkpoint whose config.json has an `nsa` section.

Weight names are Llama's, and they are the canonical names of this project; what NSA adds is
`self_attn.g_proj` and, for learnable compression, `self_attn.cmp_k` and `self_attn.cmp_v`.
"""

from collections.abc import Mapping
from typing import Any

from nsa_serve.config import ModelConfig, NSAConfig
from nsa_serve.errors import ModelError
from nsa_serve.models.config_file import (
    CheckpointFields,
    PositiveFloat,
    PositiveInt,
    parse_fields,
    read_nsa_section,
)


class LlamaFields(CheckpointFields):
    """config.json of a Llama backbone; defaults are those of transformers' LlamaConfig."""

    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    v_head_dim: PositiveInt | None = None
    intermediate_size: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False

    def model(self, *, family: str, nsa: NSAConfig, **more: Any) -> ModelConfig:
        """Return the ModelConfig of these fields with the dialect `nsa`, and of `more`."""
        head_dim = self.head_dim or self._default_head_dim()
        return ModelConfig(
            **self.common(),
            family=family,
            nsa=nsa,
            num_q_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=head_dim,
            v_head_dim=self.v_head_dim or head_dim,
            intermediate_size=self.intermediate_size,
            rms_norm_eps=self.rms_norm_eps,
            attention_bias=self.attention_bias,
            attention_out_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            **more,
        )

    def _default_head_dim(self) -> int:
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"config.json has no head_dim, and hidden_size {self.hidden_size} is no multiple "
                f"of num_attention_heads {self.num_attention_heads}; state head_dim"
            )
        return self.hidden_size // self.num_attention_heads


def read_native(raw: Mapping[str, Any], *, nsa: NSAConfig | None) -> ModelConfig:
    """Read config.json of a Llama checkpoint; `nsa` replaces its `nsa` section.

    Raises ModelError when a field is missing or wrong, or when there is no `nsa` section at all.
    """
    if nsa is None:
        if raw.get("nsa") is None:
            raise ModelError(missing_nsa_section("config.json"))
        nsa = read_nsa_section(raw["nsa"])
    return parse_fields(LlamaFields, raw).model(family="llama", nsa=nsa)


def missing_nsa_section(where: str) -> str:
    """Return the message for a Llama checkpoint that does not say how its attention is sparse."""
    return (
        f"this is a Llama checkpoint and {where} has no `nsa` section, so nothing says how its "
        "attention is sparse; add one, or give it with --nsa-config FILE (docs/models.md has every "
        'field; a dense checkpoint without gate weights needs "gate": "constant")'
    )
