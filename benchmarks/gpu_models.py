"""The models that the GPU benchmarks run: a folder each, with a tokenizer and, if asked, weights.

    python benchmarks/gpu_models.py FOLDER [--models a b moe fla] [--weights] [--tiny]

Models:

    a    1.2B, of the llama-nsa family: block 16, 16 of them selected, window 128
    b    9B, native: compression 32 by 16, block 64, 16 selected, window 512, heads of 128
    moe  27B, of the nsa_moe family: the preset nsa-27b, the shape of the NSA paper
    fla  a, but with the block of 64 that flash-linear-attention's kernels can select 16 of

Without --weights a folder is for `load_format="dummy"`. With, it gets random bf16 safetensors,
drawn on the GPU where there is one, in shards of a few gigabytes.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import tokenizers
import torch
from gpu_common import resolve_device
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from nsa_serve.config import ModelConfig, MoEConfig
from nsa_serve.model_source import ModelSource
from nsa_serve.models.dummy_weights import draw
from nsa_serve.models.families import checkpoint_name, load_model_config
from nsa_serve.models.weight_shapes import EMBEDDING, expected_weights, num_parameters

VOCAB_SIZE = 128256
NUM_SPECIALS = 256
SHARD_BYTES = 4 * 2**30
BYTES_PER_S = 4.25e12
"""What the H200's memory gives: a decode step cannot be faster than its bytes at this rate."""


@dataclass(frozen=True)
class BenchModel:
    """A model and what it is measured against.

    config: its config.json. cells: (context, rows) of the decode table. bars: the ms a step that
    each cell is to reach; dense: those of vLLM 0.24 serving a dense twin of the same shape on an
    H200, None where it was not run. prefill: (context, rows) -> (bar, dense), in tokens/s, None
    where there is none.
    """

    name: str
    title: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    cells: tuple[tuple[int, int], ...]
    bars: tuple[float, ...] = ()
    dense: tuple[float | None, ...] = ()
    prefill: dict[tuple[int, int], tuple[float | None, float | None]] = field(default_factory=dict)


_TOKENS = {"vocab_size": VOCAB_SIZE, "bos_token_id": 128000, "eos_token_id": 128001}
_COMMON = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    **_TOKENS,
}
_TINY_VOCAB = {"vocab_size": 768, "bos_token_id": 512, "eos_token_id": 513}
_TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, **_TINY_VOCAB}
_A = {
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "head_dim": 64,
    "tie_word_embeddings": True,
    **_COMMON,
}
_A_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 2}
_PRESET = json.loads((resources.files("nsa_serve") / "assets/nsa-27b/config.json").read_text())
_CELLS = ((2048, 1), (2048, 8), (2048, 32), (8192, 32), (32768, 8))

MODELS = {
    "a": BenchModel(
        name="a",
        title="A: 1.2B, 16 layers, hidden 2048, 32/2 heads of 64, block 16 (llama-nsa)",
        config={
            "model_type": "llama-nsa",
            **_A,
            **_A_HEADS,
            "block_size": 16,
            "block_counts": 16,
            "window_size": 128,
        },
        tiny={**_TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        cells=(*_CELLS, (32768, 32), (65536, 1), (65536, 8), (65536, 32)),
        bars=(0.9, 1.1, 1.7, 1.8, 1.3, 1.8, 1.0, 1.3, 2.0),
        dense=(2.11, 2.01, 2.76, None, 1.51, 3.32, None, None, 5.35),
        prefill={(2048, 8): (250e3, 250e3), (65536, 1): (160e3, 82e3)},
    ),
    "b": BenchModel(
        name="b",
        title="B: 9B, 32 layers, hidden 4096, 64/4 heads of 128, block 64 (native)",
        config={
            "model_type": "llama",
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "head_dim": 128,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            **_COMMON,
            "nsa": {
                "cmp_len": 32,
                "cmp_stride": 16,
                "block_size": 64,
                "num_selected_blocks": 16,
                "num_init_blocks": 1,
                "num_local_blocks": 2,
                "window_size": 512,
                "gate": "linear",
            },
        },
        tiny={**_TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        cells=(*_CELLS, (32768, 24), (65536, 1), (65536, 8), (65536, 24)),
        bars=(5.3, 5.6, 6.4, 7.2, 5.9, 7.5, 5.4, 6.2, 8.5),
        dense=(5.53, 5.79, 6.61, 9.67, None, 18.75, 6.56, 13.55, None),
        prefill={(2048, 8): (37.5e3, 37.5e3), (65536, 1): (25e3, 12.4e3)},
    ),
    "moe": BenchModel(
        name="moe",
        title="27B: 30 layers, hidden 2560, 64/4 heads of 192/128, 72+2 experts (nsa_moe)",
        config=_PRESET,
        tiny={
            **_TINY,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "v_head_dim": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        # 64k x 32 is more than fits beside the weights, and shows so.
        cells=tuple((c, rows) for c in (8192, 65536) for rows in (1, 8, 12, 32)),
        prefill={(8192, 1): (None, None), (65536, 1): (None, None)},
    ),
    "fla": BenchModel(
        name="fla",
        title="A with blocks of 64 (fla)",
        config={
            "model_type": "nsa",
            **{name: value for name, value in _A.items() if name != "rms_norm_eps"},
            "hidden_act": "swish",
            "norm_eps": 1e-5,
            "num_heads": 32,
            "num_kv_heads": 2,
            "block_size": 64,
            "block_counts": 16,
            "window_size": 128,
        },
        # fla wants groups of 16 query heads, or more.
        tiny={**_TINY, "num_heads": 32, "num_kv_heads": 2, "head_dim": 16},
        cells=((32768, 8),),
    ),
}


def write_model(folder: Path, name: str, *, is_tiny: bool = False) -> Path:
    """Write the folder of a model, without weights, and return it."""
    model = MODELS[name]
    config = {**model.config, **(model.tiny if is_tiny else {})}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    backend = make_tokenizer(config["vocab_size"], config["bos_token_id"])
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    tokens = {"bos_token": special_token(0), "eos_token": special_token(1)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return folder


def make_tokenizer(vocab_size: int, num_tokens: int) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer: 256 bytes, words up to `num_tokens`, then special tokens.

    It has no merges, so text becomes bytes; the words are for ids that a model samples. They are
    ASCII, so that every token of an output is text at once.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    for index in range(len(vocab), num_tokens):
        # "\u0120" is a space in this alphabet.
        vocab[f"\u0120{word(index)}"] = index
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = [special_token(index) for index in range(vocab_size - num_tokens)]
    backend.add_special_tokens([AddedToken(text, special=True) for text in specials])
    return backend


def special_token(index: int) -> str:
    """Return the text of a special token: beginning and end of a text, then reserved ones."""
    return ("<|begin_of_text|>", "<|end_of_text|>")[index] if index < 2 else f"<|reserved_{index}|>"


def word(index: int) -> str:
    """Return a word of three letters or more, another for each index."""
    letters = ""
    while index or len(letters) < 3:
        index, letter = divmod(index, 26)
        letters += chr(ord("a") + letter)
    return letters


def write_weights(folder: Path, *, device: str, shard_bytes: int = SHARD_BYTES) -> int:
    """Write random bf16 safetensors of the folder's config; return their bytes."""
    source = ModelSource(name=folder.name, folder=folder)
    config = load_model_config(source)
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = size = num_shards = 0
    expected = list(expected_weights(config).items())
    for position, (canonical, shape) in enumerate(expected, start=1):
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        name = checkpoint_name(source, config, canonical)
        shard[name] = draw(canonical, values, generator).cpu()
        size += values.nbytes
        if size < shard_bytes and position < len(expected):
            continue
        num_shards += 1
        path = f"model-{num_shards:05d}.safetensors"
        save_file(shard, folder / path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, path)
        total += size
        shard, size = {}, 0
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return total


def expected_experts(moe: MoEConfig, num_rows: int) -> float:
    """Return the distinct experts that a layer is expected to use when all are equally likely.

    E (1 - (1 - k / E)^rows): an expert is left out by each row, independently, at 1 - k / E.
    """
    missed = 1 - moe.num_experts_per_token / moe.num_experts
    return float(moe.num_experts * (1 - missed**num_rows))


def step_weight_bytes(config: ModelConfig, weight_bytes: int, num_rows: int | None = None) -> float:
    """Return the bytes of weights that a decode step reads, of `weight_bytes` that are loaded.

    All of them, but for an embedding that is not the output layer too: of it, one row a token. Of
    experts, those that `num_rows` rows are expected to use when all are equally likely; None: all.
    """
    read = float(weight_bytes)
    if not config.tie_word_embeddings:
        # In its own dtype: 8-bit weights leave the embedding in 16.
        read -= 2 * math.prod(expected_weights(config)[EMBEDDING])
    if config.moe is not None and num_rows is not None:
        moe = config.moe
        unused = moe.num_experts - expected_experts(moe, num_rows)
        expert = 3 * config.hidden_size * moe.expert_intermediate_size
        read -= 2 * unused * expert * (config.num_layers - moe.num_dense_layers)
    return read


def step_cache_bytes(config: ModelConfig, context: int, *, element_bytes: int = 2) -> int:
    """Return the least bytes of cache that a decode step reads for a row of so many tokens.

    Compressed entries, selected blocks, and the window, where it is not of the selected blocks that
    every query has: the last ones, when branches share keys and values.
    """
    nsa = config.nsa
    selected = min(context, nsa.num_selected_blocks * nsa.block_size)
    window = min(context, nsa.window_size)
    if not config.kv_per_branch:
        window = max(0, window - nsa.num_local_blocks * nsa.block_size)
    tokens = selected + window + context // nsa.cmp_stride
    token_bytes = config.num_kv_heads * (config.head_dim + config.v_head_dim) * element_bytes
    return tokens * token_bytes * config.num_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--weights", action="store_true", help="write random safetensors, too")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes of the same kind")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    options = parser.parse_args()
    for name in options.models:
        folder = write_model(options.folder / name, name, is_tiny=options.tiny)
        config = load_model_config(ModelSource(name=name, folder=folder))
        line = f"{name}: {folder}, {num_parameters(config) / 1e6:.1f} M parameters"
        if options.weights:
            start = time.perf_counter()
            num_bytes = write_weights(folder, device=resolve_device(options.device))
            seconds = time.perf_counter() - start
            line += f", {num_bytes / 1e9:.2f} GB in {seconds:.1f} s"
        print(line, flush=True)


if __name__ == "__main__":
    main()
