"""Tiny random checkpoints: config, weights, tokenizer and chat template, as folder or as GGUF.

    folder = write_checkpoint(tmp_path / "model", "nsa", seed=1)
    gguf = write_gguf(tmp_path / "model.gguf", seed=1)

The same arguments give the same bytes. Queries and keys are drawn large enough that attention
picks few tokens out of many: a wrong mask, block or position then changes the logits visibly.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nsa_serve.config import ModelConfig
from nsa_serve.model_source import ModelSource
from nsa_serve.models.families import checkpoint_name, load_model_config
from nsa_serve.models.weights import expected_weights

Family = Literal["nsa", "llama-nsa", "llama", "nsa_moe", "minicpm"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1, 2: padding and document end, start of a turn, end of a turn (the eos token)."""

VOCAB_SIZE = 300
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

NATIVE_NSA: Mapping[str, Any] = {
    "cmp_len": 8,
    "cmp_stride": 4,
    "block_size": 16,
    "num_selected_blocks": 4,
    "num_init_blocks": 1,
    "num_local_blocks": 2,
    "window_size": 24,
    "gate": "linear",
}
"""The `nsa` section of a tiny native checkpoint, before overrides."""

# block_counts 4 of 16: the largest exact selection is 8, and forced blocks need 3.
FLA_NSA: Mapping[str, Any] = {"block_size": 16, "block_counts": 4, "window_size": 24}
# As zen-E/NSA-1B: block_counts equal to block_size means the legacy selection.
LLAMA_NSA: Mapping[str, Any] = {"block_size": 8, "block_counts": 8, "window_size": 24}

_QK_STD = 1.6
_EMBEDDING_STD = 0.3


def write_checkpoint(
    folder: Path,
    family: Family = "llama",
    *,
    seed: int = 0,
    nsa: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    intermediate_size: int = 96,
    max_position_embeddings: int = 1024,
    tie_word_embeddings: bool = False,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random checkpoint that `nsa_serve` can serve, and return its folder.

    nsa: overrides of the dialect, in the family's own spelling: fields of the `nsa` section for
    "llama" (defaults NATIVE_NSA), block_size, block_counts and window_size for the others.
    config: any other field of config.json, e.g. `rope_parameters` or `v_head_dim`.
    sharded: three files and an index instead of one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    llama = family != "nsa"
    fields = {
        "model_type": family,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads" if llama else "num_heads": num_q_heads,
        "num_key_value_heads" if llama else "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps" if llama else "norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 0,
        "eos_token_id": 2,
        **_dialect(family, nsa or {}),
        **(config or {}),
    }
    _write_json(folder / "config.json", fields)
    source = ModelSource(name=folder.name, folder=folder)
    model_config = load_model_config(source)
    weights = {
        checkpoint_name(source, model_config, name): tensor.to(dtype)
        for name, tensor in random_weights(model_config, seed=seed).items()
    }
    _save(folder, weights, num_files=3 if sharded else 1)
    write_tokenizer(folder)
    return folder


def random_weights(config: ModelConfig, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw every weight of `config`, float32, by canonical name."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_weights(config).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1.0 + 0.1 * values
        elif name.startswith(("model.embed_tokens", "lm_head")):
            values = _EMBEDDING_STD * values
        elif name.endswith((".bias", ".pos")):
            values = 0.3 * values
        else:
            # Unit variance out of unit variance in; times _QK_STD**2 in an attention score.
            scale = _QK_STD if re.search(r"\.(q|k|k_\w+)_proj\.", name) else 1.0
            values = scale / math.sqrt(shape[-1]) * values
        weights[name] = values
    return weights


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of VOCAB_SIZE tokens, its settings and a chat template."""
    tokenizer = Tokenizer(models.BPE(vocab=_vocab(), merges=_merges()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def write_gguf(
    path: Path,
    *,
    seed: int = 0,
    quant_type: Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"] = "F32",
    hidden_size: int = 64,
    num_layers: int = 2,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    intermediate_size: int = 96,
    max_position_embeddings: int = 1024,
    tie_word_embeddings: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a random GGUF file of the llama architecture with a tokenizer, and return its path.

    Matrices are of `quant_type` (a quantized row must be a multiple of 32 values), norms are
    F32. It holds no NSA section: pass one with --nsa-config, gate "constant". metadata: more
    key-values, string, int or float.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(max_position_embeddings)
    writer.add_embedding_length(hidden_size)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(intermediate_size)
    writer.add_head_count(num_q_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    _add_gguf_tokenizer(writer)
    adders = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in (metadata or {}).items():
        adders[type(value)](key, value)
    rng = np.random.default_rng(seed)
    for name, shape in _gguf_shapes(
        num_layers, hidden_size, intermediate_size, num_q_heads * head_dim, num_kv_heads * head_dim
    ).items():
        if name == "output.weight" and tie_word_embeddings:
            continue
        _add_gguf_tensor(writer, name, _gguf_values(rng, name, shape), quant_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _dialect(family: Family, overrides: Mapping[str, Any]) -> dict[str, Any]:
    if family in ("llama", "nsa_moe"):
        return {"nsa": {**NATIVE_NSA, **overrides}}
    if family == "minicpm":
        return {}
    return {**(FLA_NSA if family == "nsa" else LLAMA_NSA), **overrides}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _save(folder: Path, weights: Mapping[str, torch.Tensor], *, num_files: int) -> None:
    if num_files == 1:
        save_file(dict(weights), folder / "model.safetensors")
        return
    weight_map = {}
    for number in range(num_files):
        file_name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        shard = dict(list(weights.items())[number::num_files])
        save_file(shard, folder / file_name)
        weight_map.update(dict.fromkeys(shard, file_name))
    index = {"metadata": {}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _merges() -> list[tuple[str, str]]:
    """Pairs of letters that are common in English, "Ġ" being the space."""
    pairs = "Ġt he Ġa in re on er nd Ġo Ġs at en es or is it an ed Ġw ou ing"
    pairs += " Ġth Ġthe al ar st to le ve ro ic me ll se Ġb Ġc Ġd Ġf Ġm Ġp Ġh"
    words = pairs.split()
    return [(word[:-1], word[-1]) if word != "Ġthe" else ("Ġt", "he") for word in words]


def _vocab() -> dict[str, int]:
    """Special tokens, the 256 bytes, the merges, and fillers that no text produces."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [left + right for left, right in _merges()]
    tokens += [f"<|reserved_{number}|>" for number in range(VOCAB_SIZE - len(tokens))]
    return {token: number for number, token in enumerate(tokens)}


def _add_gguf_tokenizer(writer: gguf.GGUFWriter) -> None:
    vocab = _vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(vocab))
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in vocab])
    writer.add_token_merges([" ".join(pair) for pair in _merges()])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _gguf_shapes(
    num_layers: int, hidden_size: int, intermediate_size: int, q_size: int, k_size: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB_SIZE, hidden_size)}
    for layer in range(num_layers):
        prefix = f"blk.{layer}."
        shapes[prefix + "attn_norm.weight"] = (hidden_size,)
        shapes[prefix + "attn_q.weight"] = (q_size, hidden_size)
        shapes[prefix + "attn_k.weight"] = (k_size, hidden_size)
        shapes[prefix + "attn_v.weight"] = (k_size, hidden_size)
        shapes[prefix + "attn_output.weight"] = (hidden_size, q_size)
        shapes[prefix + "ffn_norm.weight"] = (hidden_size,)
        shapes[prefix + "ffn_gate.weight"] = (intermediate_size, hidden_size)
        shapes[prefix + "ffn_up.weight"] = (intermediate_size, hidden_size)
        shapes[prefix + "ffn_down.weight"] = (hidden_size, intermediate_size)
    shapes["output_norm.weight"] = (hidden_size,)
    shapes["output.weight"] = (VOCAB_SIZE, hidden_size)
    return shapes


def _gguf_values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1.0 + np.float32(0.1) * values
    if name in ("token_embd.weight", "output.weight"):
        return np.float32(_EMBEDDING_STD) * values
    scale = _QK_STD if ".attn_q." in name or ".attn_k." in name else 1.0
    return np.float32(scale / math.sqrt(shape[-1])) * values


def _add_gguf_tensor(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray, quant_type: str
) -> None:
    if values.ndim == 1:
        writer.add_tensor(name, values)
        return
    kind = gguf.GGMLQuantizationType[quant_type]
    writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
