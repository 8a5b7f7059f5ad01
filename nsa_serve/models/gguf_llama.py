"""GGUF files of the `llama` architecture: metadata to ModelConfig, and weight names.

GGUF has no place for an `nsa` section or gate weights: the section comes from outside, and its
gates are constant and its compression a mean.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_serve.config import ModelConfig, NSAConfig, RopeScaling
from nsa_serve.errors import ModelError
from nsa_serve.gguf_metadata import read_gguf_metadata
from nsa_serve.models.gguf_tensors import GGUFTensor, read_gguf_tensors
from nsa_serve.models.native import missing_nsa_section
from nsa_serve.models.rope_fields import read_rope_scaling

# Without the vocabulary, which is most of the metadata.
_METADATA_KEYS = (
    "general.architecture",
    "llama.",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eo",
    "tokenizer.ggml.add_bos_token",
)

_NAMES = (
    ("model.embed_tokens.", "token_embd."),
    ("model.norm.", "output_norm."),
    ("lm_head.", "output."),
    ("model.layers.", "blk."),
    (".self_attn.q_proj.", ".attn_q."),
    (".self_attn.k_proj.", ".attn_k."),
    (".self_attn.v_proj.", ".attn_v."),
    (".self_attn.o_proj.", ".attn_output."),
    (".mlp.gate_proj.", ".ffn_gate."),
    (".mlp.up_proj.", ".ffn_up."),
    (".mlp.down_proj.", ".ffn_down."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
)


def gguf_name(canonical: str) -> str:
    """Return the GGUF name of a weight."""
    for ours, theirs in _NAMES:
        canonical = canonical.replace(ours, theirs)
    return canonical


def read_gguf_llama(path: Path, *, nsa: NSAConfig | None, has_adapter: bool = False) -> ModelConfig:
    """Read the config of a GGUF file. Raises ModelError when it cannot be served as NSA.

    has_adapter: an adapter brings the gate weights.
    """
    metadata = read_gguf_metadata(path, keys=_METADATA_KEYS)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelError(f"{path}: GGUF architecture {architecture!r} is not supported; 'llama' is")
    if nsa is None:
        raise ModelError(missing_nsa_section("a GGUF file"))
    if (nsa.gate != "constant" and not has_adapter) or nsa.compression != "mean":
        raise ModelError(
            "a GGUF file holds no gate or compression weights: its nsa section needs "
            f'"gate": "constant" and "compression": "mean", got {nsa.gate!r} and '
            f"{nsa.compression!r}"
        )
    return _model_config(_Metadata(metadata, str(path)), read_gguf_tensors(path), nsa)


class _Metadata:
    """Typed access; a missing or wrong key is a ModelError that names it."""

    def __init__(self, values: Mapping[str, Any], path: str) -> None:
        self._values = values
        self._path = path

    def optional_int(self, key: str) -> int | None:
        value = self._values.get(key)
        # Files with one head count a layer state a list; only uniform ones are Llamas.
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None:
            return None
        if type(value) is not int or value < 0:
            raise ModelError(f"{self._path}: {key} must be a count, got {value!r}")
        return value

    def int(self, key: str) -> int:
        value = self.optional_int(key)
        if not value:
            raise ModelError(f"{self._path}: metadata lacks {key}")
        return value

    def float(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ModelError(f"{self._path}: {key} must be a number above 0, got {value!r}")
        return float(value)

    def rope_scaling(self) -> RopeScaling:
        kind = self._values.get("llama.rope.scaling.type", "none")
        if kind == "none":
            return RopeScaling()
        if kind != "linear":
            raise ModelError(
                f"{self._path}: rope scaling {kind!r} is not supported in a GGUF file, 'linear' "
                "is; use the safetensors checkpoint, whose config.json states the scaling in full"
            )
        section = {"rope_type": kind}
        if "llama.rope.scaling.factor" in self._values:
            section["factor"] = self._values["llama.rope.scaling.factor"]
        return read_rope_scaling(section)


def _model_config(
    metadata: _Metadata, tensors: Mapping[str, GGUFTensor], nsa: NSAConfig
) -> ModelConfig:
    if metadata.optional_int("llama.expert_count"):
        raise ModelError("a GGUF mixture of experts (llama.expert_count) is not supported")
    if "rope_freqs.weight" in tensors:
        raise ModelError(
            "this GGUF file scales its rotary embedding with the tensor rope_freqs.weight, which "
            "is not supported; use the safetensors checkpoint, whose config.json states the scaling"
        )
    hidden_size = metadata.int("llama.embedding_length")
    num_q_heads = metadata.int("llama.attention.head_count")
    head_dim = metadata.optional_int("llama.attention.key_length") or hidden_size // num_q_heads
    if metadata.optional_int("llama.rope.dimension_count") not in (None, head_dim):
        raise ModelError(f"llama.rope.dimension_count must be the head_dim, {head_dim}")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError("the GGUF file lacks the matrix token_embd.weight")
    eos_ids = [metadata.optional_int(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return ModelConfig(
        family="llama",
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        num_layers=metadata.int("llama.block_count"),
        num_q_heads=num_q_heads,
        num_kv_heads=metadata.optional_int("llama.attention.head_count_kv") or num_q_heads,
        head_dim=head_dim,
        v_head_dim=metadata.optional_int("llama.attention.value_length") or head_dim,
        intermediate_size=metadata.int("llama.feed_forward_length"),
        nsa=nsa,
        rms_norm_eps=metadata.float("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=metadata.float("llama.rope.freq_base", 10000.0),
        rope_scaling=metadata.rope_scaling(),
        max_position_embeddings=metadata.int("llama.context_length"),
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        attention_out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        checkpoint_dtype="float32",
        bos_token_id=metadata.optional_int("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(item for item in eos_ids if item is not None)),
    )
