"""The cache tensors: what a page costs, how many pages fit, and the pages themselves."""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

from nsa_kernels.ops import LayerCache
from nsa_serve.config import ModelConfig, StepLimits
from nsa_serve.errors import CapacityError
from nsa_serve.messages import CacheComponent
from nsa_serve.page_cost import PageCost
from nsa_serve.window_pages import history_len, num_row_pages, num_step_pages


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> dict[str, float]:
    """Return the cache bytes of one token over all layers, by component.

    raw: keys and values; compressed: one entry of each per `cmp_stride` tokens; coarse, where there
    are such windows: one key per `lse_stride` tokens.
    """
    raw = _raw_bytes(config, dtype)
    sizes = {"raw": raw, "compressed": raw / config.nsa.cmp_stride}
    if config.nsa.lse_len:
        keys = config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
        sizes["coarse"] = keys / config.nsa.lse_stride
    return sizes


def window_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> dict[str, float]:
    """Return the bytes of one token of a window page over all layers; empty where there are none.

    window: keys and values; tail: those for open compression windows, the last `cmp_len` of a page.
    """
    if not config.kv_per_branch:
        return {}
    raw = _raw_bytes(config, dtype)
    return {"window": raw, "tail": raw * config.nsa.cmp_len / config.nsa.block_size}


def bytes_per_page(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one page over all layers: page_size tokens and their entries."""
    return round(sum(bytes_per_token(config, dtype).values()) * config.nsa.block_size)


def bytes_per_window_page(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one window page over all layers; 0 where there are none."""
    return round(sum(window_bytes_per_token(config, dtype).values()) * config.nsa.block_size)


def page_cost(
    config: ModelConfig, dtype: torch.dtype, limits: StepLimits, max_model_len: int
) -> PageCost:
    """Return what pages cost in a cache of this dtype, and how many window pages steps need."""
    page_bytes, spec = bytes_per_page(config, dtype), config.nsa
    if not config.kv_per_branch:
        return PageCost(
            page_bytes=page_bytes,
            fp8_page_bytes=bytes_per_page(config, torch.float8_e4m3fn),
            page_size=spec.block_size,
            max_model_len=max_model_len,
        )
    return PageCost(
        page_bytes=page_bytes,
        # There is no such cache (`engine_setup`), so it is no way to save memory.
        fp8_page_bytes=page_bytes,
        page_size=spec.block_size,
        max_model_len=max_model_len,
        swa_page_bytes=bytes_per_window_page(config, dtype),
        num_step_swa_pages=num_step_pages(
            spec.block_size,
            history_len=history_len(spec.window_size, spec.cmp_len),
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_seqs=limits.max_num_seqs,
        ),
    )


def components(
    config: ModelConfig, dtype: torch.dtype, num_pages: int, num_swa_pages: int = 0
) -> list[CacheComponent]:
    """Return the rows of the cache table for `num_pages` pages and as many window pages."""
    spec = config.nsa
    size = spec.block_size
    history = history_len(spec.window_size, spec.cmp_len)
    held = num_row_pages(size, history_len=history) * size
    return [
        CacheComponent(name, each, round(each * num_pages * size))
        for name, each in bytes_per_token(config, dtype).items()
    ] + [
        CacheComponent(name, each, round(each * num_swa_pages * size), held)
        for name, each in window_bytes_per_token(config, dtype).items()
    ]


def num_pages_for(cost: PageCost, page_memory: int) -> int:
    """Return how many pages fit in `page_memory` bytes, the null page included.

    Raises CapacityError when not even one page for tokens fits beside the null page.
    """
    count = cost.num_pages_in(page_memory)
    if count < 2:
        raise CapacityError(
            f"page_memory of {page_memory} bytes holds {count} pages of {cost.page_bytes} bytes; "
            f"at least 2 are needed (one of them is the null page)"
            + (
                f", beside {cost.num_swa_pages(2)} window pages of {cost.swa_page_bytes} bytes, "
                "whose number grows with --max-num-batched-tokens and --max-num-seqs"
                if cost.num_step_swa_pages
                else ""
            )
            + f": raise --page-memory to {cost.bytes_of(2)} or more"
        )
    return count


def _raw_bytes(config: ModelConfig, dtype: torch.dtype) -> float:
    """Return the bytes of one token's keys and values over all layers, of one branch."""
    width = config.num_kv_heads * (config.head_dim + config.v_head_dim) * dtype.itemsize
    return float(config.num_layers * width)


class KVCache:
    """Pages of every layer: `layers[i]` is what layer i's attention reads and writes.

    Memory is left uninitialised except for the null pages; the operators zero what they open.
    num_swa_pages: window pages, with their null page; for a model with `kv_per_branch`, and only
    for one. scales: of keys and of values of every layer, each [H] fp32, where dtype is
    torch.float8_e4m3fn; None is 1 everywhere.

    Raises ValueError for scales of any other dtype, and for window pages that the model lacks.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_swa_pages: int = 0,
        scales: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        nsa, heads = config.nsa, config.num_kv_heads
        if (num_swa_pages > 0) != config.kv_per_branch:
            raise ValueError(
                f"kv_per_branch is {config.kv_per_branch}, so the cache "
                f"{'needs' if config.kv_per_branch else 'has no'} window pages, got {num_swa_pages}"
            )

        key, value = config.head_dim, config.v_head_dim

        def pages(tokens: int, dim: int, count: int = num_pages) -> torch.Tensor:
            tensor = allocate((count, heads, tokens, dim), dtype=dtype, device=device)
            tensor[0].zero_()
            return tensor

        def window_pages(tokens: int, dim: int) -> torch.Tensor | None:
            return pages(tokens, dim, num_swa_pages) if num_swa_pages else None

        layer_scales: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]]
        if dtype == torch.float8_e4m3fn:
            ones = torch.ones(heads, dtype=torch.float32, device=device)
            layer_scales = scales or [(ones, ones)] * config.num_layers
        elif scales is None:
            layer_scales = [(None, None)] * config.num_layers
        else:
            raise ValueError(f"scales are for a cache in torch.float8_e4m3fn, not in {dtype}")

        self.num_pages = num_pages
        self.num_swa_pages = num_swa_pages
        self.layers = [
            LayerCache(
                k=pages(nsa.block_size, key),
                v=pages(nsa.block_size, value),
                k_cmp=pages(nsa.cmp_entries_per_page, key),
                v_cmp=pages(nsa.cmp_entries_per_page, value),
                k_swa=window_pages(nsa.block_size, key),
                v_swa=window_pages(nsa.block_size, value),
                k_tail=window_pages(nsa.cmp_len, key),
                v_tail=window_pages(nsa.cmp_len, value),
                k_lse=pages(nsa.block_size // nsa.lse_stride, key) if nsa.lse_len else None,
                k_scale=k_scale,
                v_scale=v_scale,
            )
            for _, (k_scale, v_scale) in zip(range(config.num_layers), layer_scales, strict=True)
        ]


def allocate(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised tensor; on the CPU in huge pages where the system has them.

    Selected pages lie anywhere in gigabytes of cache: with 4 KiB pages each one misses the TLB.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
