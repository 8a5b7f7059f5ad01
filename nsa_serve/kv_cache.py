"""The cache tensors: what a page costs, how many pages fit, and the pages themselves."""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

from nsa_kernels.ops import LayerCache
from nsa_serve.config import ModelConfig
from nsa_serve.errors import CapacityError
from nsa_serve.messages import CacheComponent


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> dict[str, float]:
    """Return the cache bytes of one token over all layers, by component.

    raw: keys and values; compressed: one entry of each per `cmp_stride` tokens.
    """
    width = config.num_kv_heads * (config.head_dim + config.v_head_dim) * dtype.itemsize
    raw = float(config.num_layers * width)
    return {"raw": raw, "compressed": raw / config.nsa.cmp_stride}


def bytes_per_page(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one page over all layers: page_size tokens and their entries."""
    return round(sum(bytes_per_token(config, dtype).values()) * config.nsa.block_size)


def components(config: ModelConfig, dtype: torch.dtype, num_pages: int) -> list[CacheComponent]:
    """Return the rows of the cache table for `num_pages` pages."""
    return [
        CacheComponent(name, size, round(size * num_pages * config.nsa.block_size))
        for name, size in bytes_per_token(config, dtype).items()
    ]


def num_pages_for(config: ModelConfig, dtype: torch.dtype, page_memory: int) -> int:
    """Return how many pages fit in `page_memory` bytes, the null page included.

    Raises CapacityError when not even one page for tokens fits beside the null page.
    """
    per_page = bytes_per_page(config, dtype)
    count = page_memory // per_page
    if count < 2:
        raise CapacityError(
            f"page_memory of {page_memory} bytes holds {count} pages of {per_page} bytes; "
            f"at least 2 are needed (one of them is the null page): raise --page-memory to "
            f"{2 * per_page} or more"
        )
    return count


class KVCache:
    """Pages of every layer: `layers[i]` is what layer i's attention reads and writes.

    Memory is left uninitialised except for the null page; the operators zero what they open.
    scales: of keys and of values of every layer, each [H] fp32, where dtype is
    torch.float8_e4m3fn; None is 1 everywhere. ValueError for scales of any other dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        scales: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        nsa, heads = config.nsa, config.num_kv_heads

        def pages(tokens: int, dim: int) -> torch.Tensor:
            shape = (num_pages, heads, tokens, dim)
            tensor = allocate(shape, dtype=dtype, device=device)
            tensor[0].zero_()
            return tensor

        layer_scales: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]]
        if dtype == torch.float8_e4m3fn:
            ones = torch.ones(heads, dtype=torch.float32, device=device)
            layer_scales = scales or [(ones, ones)] * config.num_layers
        elif scales is None:
            layer_scales = [(None, None)] * config.num_layers
        else:
            raise ValueError(f"scales are for a cache in torch.float8_e4m3fn, not in {dtype}")

        self.num_pages = num_pages
        self.layers = [
            LayerCache(
                k=pages(nsa.block_size, config.head_dim),
                v=pages(nsa.block_size, config.v_head_dim),
                k_cmp=pages(nsa.cmp_entries_per_page, config.head_dim),
                v_cmp=pages(nsa.cmp_entries_per_page, config.v_head_dim),
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
