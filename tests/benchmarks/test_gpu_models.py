"""The models of the GPU benchmarks are what their tables say, and load like any checkpoint."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_fla import window_attention, window_attention_varlen
from gpu_models import (
    MODELS,
    expected_experts,
    make_tokenizer,
    step_cache_bytes,
    step_weight_bytes,
    word,
    write_model,
    write_weights,
)
from report_gpu import gpu_section

from nsa_serve.config import MoEConfig
from nsa_serve.model_source import ModelSource
from nsa_serve.models.families import checkpoint_name, load_model_config
from nsa_serve.models.safetensors_files import read_weight_index
from nsa_serve.models.weight_shapes import expected_weights, num_parameters
from nsa_serve.tokenizer import Tokenizer

TEXT = "Hello, wörld 😀\n\t  two  spaces 日本語"


@pytest.mark.parametrize(
    ("name", "num_layers", "heads", "head_dim", "nsa", "billions"),
    [
        ("a", 16, (32, 2), 64, (16, 16, 16, 16, 128), 1.21),
        ("b", 32, (64, 4), 128, (32, 16, 64, 16, 512), 9.0),
        ("fla", 16, (32, 2), 64, (64, 64, 64, 16, 128), 1.21),
    ],
)
def test_models_have_the_shapes_that_the_tables_name(
    tmp_path: Path,
    *,
    name: str,
    num_layers: int,
    heads: tuple[int, int],
    head_dim: int,
    nsa: tuple[int, ...],
    billions: float,
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODELS[name].config))
    config = load_model_config(ModelSource(name=name, folder=folder))
    spec = config.nsa
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads) == (num_layers, *heads)
    assert (config.head_dim, config.v_head_dim) == (head_dim, head_dim)
    sizes = (spec.cmp_len, spec.cmp_stride, spec.block_size, spec.num_selected_blocks)
    assert (*sizes, spec.window_size) == nsa
    assert spec.gate == "linear"
    assert num_parameters(config) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("name", ["a", "b"])
def test_every_cell_has_a_bar(name: str) -> None:
    model = MODELS[name]
    assert len(model.cells) == len(model.bars) == len(model.dense)
    assert len(set(model.cells)) == len(model.cells)


def test_a_step_reads_no_embedding_that_is_not_the_output_layer(tmp_path: Path) -> None:
    for name, left_out in (("a", 0), ("b", 2 * 768 * 64)):
        folder = write_model(tmp_path / name, name, is_tiny=True)
        raw = json.loads((folder / "config.json").read_text())
        config = load_model_config(ModelSource(name=name, folder=folder))
        assert raw.get("tie_word_embeddings", False) is (left_out == 0)
        assert step_weight_bytes(config, 10**6) == 10**6 - left_out


def test_a_step_reads_the_experts_that_its_rows_are_expected_to_use(tmp_path: Path) -> None:
    folder = tmp_path / "moe"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODELS["moe"].config))
    config = load_model_config(ModelSource(name="moe", folder=folder))
    loaded = 2 * num_parameters(config)
    assert loaded / 2e9 == pytest.approx(27, abs=0.6)
    per_layer = 3 * 2 * config.hidden_size * 1472
    every = step_weight_bytes(config, loaded)
    assert every == loaded - 2 * 102400 * 2560
    one = step_weight_bytes(config, loaded, 1)
    assert every - one == pytest.approx((72 - 6) * 29 * per_layer)
    two = step_weight_bytes(config, loaded, 2)
    assert two - one == pytest.approx(6 * (66 / 72) * 29 * per_layer)
    assert step_weight_bytes(config, loaded, 1000) == pytest.approx(every)


def test_a_step_reads_selected_blocks_the_window_and_compressed_entries(tmp_path: Path) -> None:
    found = {}
    for name in ("moe", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(MODELS[name].config))
        config = load_model_config(ModelSource(name=name, folder=folder))
        found[name] = step_cache_bytes(config, 65536)
        assert step_cache_bytes(config, 100) < found[name]
    assert found["moe"] == (1024 + 512 + 4096) * 4 * (192 + 128) * 2 * 30
    # Of a window of 512, 128 tokens are in the two last blocks, which are always selected.
    assert found["b"] == (1024 + 384 + 4096) * 4 * 256 * 2 * 32


@pytest.mark.parametrize("vocab_size", [768, 128256])
def test_the_tokenizer_round_trips_and_every_word_is_text(tmp_path: Path, vocab_size: int) -> None:
    num_tokens = vocab_size - 256
    make_tokenizer(vocab_size, num_tokens).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == vocab_size
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT
    words = [tokenizer.decode([i], skip_special_tokens=False) for i in range(256, num_tokens)]
    assert len(set(words)) == len(words)
    assert all(text.strip().isascii() and text.strip().isalpha() for text in words)
    assert tokenizer.decode([num_tokens + 1], skip_special_tokens=False) == "<|end_of_text|>"
    assert len({word(index) for index in range(5000)}) == 5000


@pytest.mark.parametrize("name", list(MODELS))
def test_weights_are_complete_in_several_shards(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / name, name, is_tiny=True)
    num_bytes = write_weights(folder, device="cpu", shard_bytes=100_000)
    source = ModelSource(name=name, folder=folder)
    config = load_model_config(source)
    stored = read_weight_index(folder)
    expected = {checkpoint_name(source, config, n): s for n, s in expected_weights(config).items()}
    assert {weight: item.shape for weight, item in stored.items()} == expected
    assert len({item.path for item in stored.values()}) > 1
    assert num_bytes == 2 * num_parameters(config)


def brute_window(q: Any, k: Any, v: Any, before: int) -> Any:
    """Every query of [B, TQ, HQ, D] over all keys, masked."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    positions = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    distance = positions - torch.arange(k.shape[2])
    mask = (distance >= 0) & (distance <= before)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize(("num_queries", "length"), [(1, 1), (1, 5), (1, 111), (64, 64), (65, 111)])
def test_the_stand_in_for_flash_attn_is_a_window(
    monkeypatch: pytest.MonkeyPatch, num_queries: int, length: int
) -> None:
    monkeypatch.setattr("gpu_fla._CHUNK", 17)
    generator = torch.Generator().manual_seed(num_queries + length)
    q = torch.randn(3, num_queries, 8, 4, generator=generator)
    k, v = (torch.randn(3, length, 2, 4, generator=generator) for _ in range(2))
    expected = brute_window(q, k, v, 23)
    actual = window_attention(q, k, v, causal=True, window_size=(23, 0))
    torch.testing.assert_close(actual, expected)
    flat = window_attention_varlen(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q=torch.arange(4) * num_queries,
        cu_seqlens_k=torch.arange(4) * length,
        max_seqlen_q=num_queries,
        max_seqlen_k=length,
        causal=True,
        window_size=(23, 0),
    )
    torch.testing.assert_close(flat, expected.flatten(0, 1))


def test_the_report_has_bars_and_says_what_was_skipped(tmp_path: Path) -> None:
    assert gpu_section(tmp_path) == ""
    cell = {"context": 2048, "rows": 8, "bar_ms": 1.1, "dense_ms": 2.0}
    measured = {
        "num_sampled": 0,
        "ms_per_step": 1.0,
        "step_ms_p50": 0.98,
        "step_ms_p99": None,
        "tokens_per_s": 8000.0,
        "of_weight_floor": 0.57,
    }
    bars = {"bar_tokens_per_s": 250e3, "dense_tokens_per_s": None}
    result = {
        "model": "a",
        "title": "A",
        "settings": {"quantization": "fp8"},
        "device_name": "GPU",
        "torch": "2",
        "triton": "3",
        "commit": None,
        "date": "today",
        "command": "python x",
        "decode": [{**cell, **measured}, {**cell, "rows": 32, "skipped": "too many pages"}],
        "prefill": [{"context": 2048, "rows": 8, "tokens_per_s": 123456.0, **bars}],
    }
    (tmp_path / "gpu-decode-a.json").write_text(json.dumps(result))
    text = gpu_section(tmp_path)
    assert "| 2k x 8 | 1.00 | 0.98 | - | 1.1 | 2.00 | 2.00x | 8,000 | 57% |" in text
    assert "| 2k x 32 | too many pages |" in text
    assert "| a (quantization fp8) | 2k x 8 | 123,456 | 250,000 | - |" in text


def test_expected_experts_is_the_mean_over_every_choice_of_every_row() -> None:
    moe = MoEConfig(
        num_experts=5,
        num_experts_per_token=2,
        num_shared_experts=0,
        expert_intermediate_size=8,
        num_dense_layers=0,
    )
    choices = list(itertools.combinations(range(5), 2))
    for num_rows in (1, 2, 3):
        used = [
            len({*itertools.chain(*rows)}) for rows in itertools.product(choices, repeat=num_rows)
        ]
        assert expected_experts(moe, num_rows) == pytest.approx(sum(used) / len(used), rel=1e-12)
