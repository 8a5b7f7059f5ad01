"""Fields of config.json that change what a model computes, in ways that are not served.

A checkpoint that has one is refused by name, instead of answering wrongly. Fields of training only
(attention_dropout, initializer_range, aux_loss_alpha, ...) are not here: they are ignored.
"""

from collections.abc import Callable, Container, Mapping
from typing import Any

from nsa_serve.errors import ModelError

Harmless = Callable[[Any], bool]
"""True for a value of the field that means it is not used."""


def _absent(value: Any) -> bool:
    return value is None or value is False or value == 0 or value == [] or value == {}


def _one(value: Any) -> bool:
    return value is None or value == 1


def _true(value: Any) -> bool:
    return value is None or value is True


def _full_attention(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(item == "full_attention" for item in value)
    )


_MLA = "it belongs to multi-head latent attention (MLA), which is another attention"
_MOE = "it belongs to a mixture of experts; only the nsa_moe family has one (n_routed_experts)"
_SCALE = "it scales activations, as no model of this family does"
_CAP = "it caps scores or logits"
_MTP = "layers that predict further tokens (MTP) are not loaded; remove them and set it to 0"
_NORM = "norms of queries and keys are not computed"
_ROPE = "layers without rotary embedding are not computed"
_OUTPUT_GATE = "gates on the output of attention are not computed"

_RULES: Mapping[str, tuple[Harmless, str]] = {
    "quantization_config": (
        _absent,
        "the checkpoint is quantized; use the unquantized safetensors",
    ),
    "compression_config": (_absent, "the checkpoint is quantized; use the unquantized safetensors"),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim"), (_absent, _MLA)),
    **dict.fromkeys(("qk_nope_head_dim", "index_topk", "index_n_heads"), (_absent, _MLA)),
    "mixer_types": (
        _absent,
        "layers of several kinds (MiniCPM-SALA mixes in linear attention) are not computed",
    ),
    "layer_types": (_full_attention, "layers of several kinds are not computed"),
    "sliding_window_layers": (_absent, "layers with other windows are not computed"),
    "attention_chunk_size": (_absent, "attention within chunks is not computed"),
    "attn_use_rope": (_true, _ROPE),
    "use_rope": (_true, _ROPE),
    "no_rope": (_absent, _ROPE),
    "no_rope_layers": (_absent, _ROPE),
    "no_rope_layer_interval": (_absent, _ROPE),
    "use_nope": (_absent, _ROPE),
    "rope_interleave": (_absent, "only the half-rotation of Llama is computed"),
    "rope_interleaved": (_absent, "only the half-rotation of Llama is computed"),
    "alibi": (_absent, "biases by distance are not computed"),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm"), (_absent, _NORM)),
    **dict.fromkeys(("o_gate", "use_output_gate", "attn_use_output_gate"), (_absent, _OUTPUT_GATE)),
    "attnres_block_size": (
        _absent,
        "attention residuals are not computed; only the plain residual stream is",
    ),
    "nosa_config": (_absent, "NOSA chooses blocks also by what does not depend on the query"),
    "locality_config": (_absent, "NOSA chooses blocks also by what does not depend on the query"),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), (_absent, _MTP)),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), (_absent, _MOE)),
    "moe_intermediate_size": (_absent, _MOE),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (_absent, _CAP)),
    **dict.fromkeys(("logit_softcap", "clip_qkv", "logits_soft_cap"), (_absent, _CAP)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), (_one, _SCALE)),
    **dict.fromkeys(("logits_scaling", "logit_scale", "scale_emb"), (_one, _SCALE)),
    "scale_depth": (_one, _SCALE),
    "dim_model_base": (_absent, _SCALE),
    "attention_multiplier": (_absent, "scores are scaled by 1 / sqrt(head_dim) only"),
    "query_pre_attn_scalar": (_absent, "scores are scaled by 1 / sqrt(head_dim) only"),
    "parallel_attn": (_absent, "attention and MLP one after the other are computed"),
    "use_parallel_residual": (_absent, "attention and MLP one after the other are computed"),
    "is_encoder_decoder": (_absent, "only decoders are served"),
    "vision_config": (_absent, "only text models are served"),
    "audio_config": (_absent, "only text models are served"),
}
# Names in `architectures` that share a model_type with something else.
_ARCHITECTURES = {
    "MiniCPMSALA": "MiniCPM-SALA mixes in linear attention",
    "NOSA": "NOSA chooses blocks also by what does not depend on the query",
    "ForSequenceClassification": "only language models are served",
    "ForTokenClassification": "only language models are served",
    "ForQuestionAnswering": "only language models are served",
}


def refuse_unsupported(raw: Mapping[str, Any], *, known: Container[str]) -> None:
    """Raise ModelError for a field, or an architecture, that the engine would not compute.

    known: fields that the family reads itself.
    """
    for name, value in raw.items():
        if name in _RULES and name not in known:
            is_harmless, reason = _RULES[name]
            if not is_harmless(value):
                raise ModelError(f"config.json: {name} {_short(value)} is not supported: {reason}")
    window, is_used = raw.get("sliding_window"), raw.get("use_sliding_window", True)
    if not _absent(window) and is_used is not False:
        raise ModelError(
            f"config.json: sliding_window {_short(window)} is not supported: a window instead of "
            "full attention is not what NSA's window_size says; describe the attention in the nsa "
            "section and set it to null"
        )
    for architecture in raw.get("architectures") or ():
        for part, reason in _ARCHITECTURES.items():
            if part in str(architecture):
                raise ModelError(
                    f"config.json: architectures {architecture!r} is not supported: {reason}"
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
