"""Window pages as memory: their tensors, what they cost, and how many there are."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_kernels.metadata import LayerCache
from nsa_serve import engine_setup
from nsa_serve.config import EngineConfig, ModelConfig, NSAConfig, make_config
from nsa_serve.engine_setup import size_cache
from nsa_serve.errors import CapacityError, ConfigError
from nsa_serve.kv_cache import (
    KVCache,
    bytes_per_page,
    bytes_per_token,
    bytes_per_window_page,
    components,
    page_cost,
    window_bytes_per_token,
)
from nsa_serve.page_cost import PageCost
from nsa_serve.page_pool import PagePool
from nsa_serve.scheduler import SampledToken, Scheduler
from nsa_serve.window_pages import WindowPages, history_len

from .paged_model import make_request

CPU = torch.device("cpu")
TENSORS = ("k", "v", "k_cmp", "v_cmp", "k_swa", "v_swa", "k_tail", "v_tail", "k_lse")


def shape(nsa: NSAConfig, **fields: Any) -> ModelConfig:
    """A model of which only the cache's geometry matters."""
    values: dict[str, Any] = {
        "family": "nsa_moe",
        "vocab_size": 64,
        "hidden_size": 64,
        "num_layers": 3,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 12,
        "v_head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 4096,
        "nsa": nsa,
    }
    return ModelConfig(**(values | fields))


SMALL = NSAConfig(
    cmp_len=8,
    cmp_stride=4,
    block_size=16,
    num_selected_blocks=4,
    num_local_blocks=2,
    window_size=24,
)
PER_BRANCH = shape(SMALL, kv_per_branch=True)
COARSE = shape(replace(SMALL, score_map="max_pool", lse_len=32, lse_stride=8))
# Section 1.2 of the paper: 30 layers, 4 KV heads, D 192, Dv 128; l 32, d 16, l' 64, window 512.
PAPER = shape(
    NSAConfig(),
    num_layers=30,
    num_q_heads=64,
    num_kv_heads=4,
    head_dim=192,
    v_head_dim=128,
    kv_per_branch=True,
    max_position_embeddings=65_536,
)


def tensors(layer: LayerCache) -> Iterator[torch.Tensor]:
    for name in TENSORS:
        tensor = getattr(layer, name)
        if tensor is not None:
            yield tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("config", "num_swa_pages"), [(PER_BRANCH, 7), (COARSE, 0)])
def test_pages_cost_what_the_tensors_take(
    config: ModelConfig, num_swa_pages: int, dtype: torch.dtype
) -> None:
    cache = KVCache(config, 5, dtype=dtype, device=CPU, num_swa_pages=num_swa_pages)
    num_bytes = sum(t.numel() * t.element_size() for layer in cache.layers for t in tensors(layer))
    window = num_swa_pages * bytes_per_window_page(config, dtype)
    assert num_bytes == 5 * bytes_per_page(config, dtype) + window
    assert all(tensor[0].eq(0).all() for layer in cache.layers for tensor in tensors(layer))
    table = components(config, dtype, 5, num_swa_pages)
    assert sum(part.total_bytes for part in table) == num_bytes


def test_the_tensors_of_window_pages_and_coarse_keys() -> None:
    layer = KVCache(PER_BRANCH, 5, dtype=torch.float32, device=CPU, num_swa_pages=7).layers[2]
    shapes = {name: tuple(t.shape) for name in TENSORS if (t := getattr(layer, name)) is not None}
    assert shapes == {
        "k": (5, 2, 16, 12),
        "v": (5, 2, 16, 8),
        "k_cmp": (5, 2, 4, 12),
        "v_cmp": (5, 2, 4, 8),
        "k_swa": (7, 2, 16, 12),
        "v_swa": (7, 2, 16, 8),
        "k_tail": (7, 2, 8, 12),
        "v_tail": (7, 2, 8, 8),
    }
    layer = KVCache(COARSE, 5, dtype=torch.float32, device=CPU).layers[0]
    assert layer.k_lse is not None
    assert tuple(layer.k_lse.shape) == (5, 2, 2, 12)
    assert layer.k_swa is None


@pytest.mark.parametrize(("config", "num_swa_pages"), [(PER_BRANCH, 0), (COARSE, 3)])
def test_window_pages_are_for_models_that_have_them(
    config: ModelConfig, num_swa_pages: int
) -> None:
    with pytest.raises(ValueError, match="window pages, got"):
        KVCache(config, 5, dtype=torch.float32, device=CPU, num_swa_pages=num_swa_pages)


@pytest.mark.parametrize("config", [PER_BRANCH, COARSE])
def test_an_fp8_cache_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="leave --kv-cache-dtype out"):
        engine_setup._check_fp8_cache(CPU, config)


def test_components_name_what_a_sequence_holds() -> None:
    raw = 30 * 4 * 320 * 2
    table = components(PAPER, torch.bfloat16, 1000, 100)
    assert [(part.name, part.bytes_per_token, part.max_tokens) for part in table] == [
        ("raw", raw, None),
        ("compressed", raw / 16, None),
        ("window", raw, 640),
        ("tail", raw / 2, 640),
    ]
    assert [part.total_bytes for part in table] == [
        *(64_000 * raw, 4_000 * raw, 6_400 * raw, 3_200 * raw)
    ]
    coarse = bytes_per_token(COARSE, torch.bfloat16)["coarse"]
    assert coarse == 3 * 2 * 12 * 2 / 8
    assert window_bytes_per_token(COARSE, torch.bfloat16) == {}


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(
    page_bytes=st.integers(1, 5000),
    swa_page_bytes=st.integers(1, 9000),
    num_step_swa_pages=st.integers(0, 40),
    memory=st.integers(0, 10**6),
)
def test_as_many_pages_as_memory_holds(
    page_bytes: int, swa_page_bytes: int, num_step_swa_pages: int, memory: int
) -> None:
    cost = PageCost(
        page_bytes=page_bytes,
        fp8_page_bytes=page_bytes,
        page_size=16,
        max_model_len=100,
        swa_page_bytes=swa_page_bytes if num_step_swa_pages else 0,
        num_step_swa_pages=num_step_swa_pages,
    )
    num_pages = cost.num_pages_in(memory)
    assert num_pages == 0 or cost.bytes_of(num_pages) <= memory
    assert cost.bytes_of(num_pages + 1) > memory


def config(**options: Any) -> EngineConfig:
    return make_config(EngineConfig, {"model": "m", **options})


def test_cpu_pages_leave_room_for_window_pages() -> None:
    chosen = config(page_memory="64MiB", max_num_seqs=4, max_num_batched_tokens=100)
    cost = page_cost(PER_BRANCH, torch.float32, chosen.limits("cpu", 4096), 4096)
    # Windows of 24 tokens: 4 pages a request, 7 for a chunk, and the null page.
    assert cost.num_step_swa_pages == 7 + 4 * 4 + 1
    num_pages = size_cache(chosen, PER_BRANCH, torch.float32, 4096)
    assert cost.num_swa_pages(num_pages) == 24 + num_pages // 8
    assert cost.bytes_of(num_pages) <= 64 * 2**20 < cost.bytes_of(num_pages + 1)


@pytest.mark.parametrize(
    ("page_memory", "options", "want"),
    [(200_000, {}, 2), (400_000, {"max_model_len": 700}, 1 + 44)],
)
def test_refusals_of_cpu_memory_count_window_pages(
    page_memory: int, options: dict[str, Any], want: int
) -> None:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 100, **options}
    max_model_len = options.get("max_model_len", 4096)

    def size(num_bytes: int) -> int:
        chosen = config(page_memory=num_bytes, **limits)
        return size_cache(chosen, PER_BRANCH, torch.float32, max_model_len)

    with pytest.raises(CapacityError) as caught:
        size(page_memory)
    found = re.search(r"--page-memory (?:to )?(\d+)", str(caught.value))
    assert found is not None
    needed = int(found[1])
    assert size(needed) == want
    with pytest.raises(CapacityError):
        size(needed - 1)


def test_64k_tokens_of_the_paper_hold_little_more_than_a_dense_cache() -> None:
    """At most 1.08 times the bytes of a dense cache with one set of keys and values."""
    num_tokens, dtype = 65_536, torch.bfloat16
    limits = config().limits("cuda", num_tokens)
    cost = page_cost(PAPER, dtype, limits, num_tokens)
    num_pages = num_tokens // 64 + 2
    pool = PagePool(num_pages, 64)
    windows = WindowPages(
        PagePool(cost.num_swa_pages(num_pages), 64), history_len=history_len(512, 32)
    )
    scheduler = Scheduler(
        pool,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=num_tokens,
        windows=windows,
    )
    dense_page_bytes = bytes_per_token(PAPER, dtype)["raw"] * 64
    request = make_request("long", [5] * (num_tokens - 100), max_tokens=100)
    scheduler.add(request)
    shares = []
    while scheduler.has_unfinished:
        output = scheduler.schedule()
        if request.num_output_tokens:
            held = (pool.num_pages - pool.num_free_pages) * bytes_per_page(PAPER, dtype)
            num_window_pages = windows.pool.num_pages - windows.pool.num_free_pages
            held += num_window_pages * bytes_per_window_page(PAPER, dtype)
            shares.append(held / (len(request.pages) * dense_page_bytes))
        scheduler.update(output, {"long": SampledToken(9)})
    assert len(shares) == 99
    assert max(shares) <= 1.08
    assert min(shares) > 1 + 1 / 16
