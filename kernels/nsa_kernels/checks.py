"""Checks of what callers pass to the public operators."""

import torch
from torch import Tensor

from nsa_kernels.metadata import BranchKV, LayerCache
from nsa_kernels.spec import NSASpec


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError, naming the tensor and both shapes, unless it has the expected shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")


def check_scales(cache: LayerCache, num_kv_heads: int) -> None:
    """Raise ValueError unless an FP8 cache has its scales, and any other cache has none."""
    pages = (cache.k, cache.v, cache.k_cmp, cache.v_cmp)
    num_fp8 = sum(tensor.dtype == torch.float8_e4m3fn for tensor in pages)
    scales = (("k_scale", cache.k_scale), ("v_scale", cache.v_scale))
    num_scales = sum(scale is not None for _, scale in scales)
    if (num_fp8, num_scales) not in ((0, 0), (4, 2)):
        raise ValueError(
            "an FP8 cache has k, v, k_cmp and v_cmp in torch.float8_e4m3fn, with k_scale and "
            f"v_scale; got {num_fp8} of the four tensors in that dtype and {num_scales} scales"
        )
    for name, scale in scales:
        if scale is not None:
            check_shape(name, scale, (num_kv_heads,))
            if scale.dtype != torch.float32:
                raise ValueError(f"{name} must be torch.float32, got {scale.dtype}")
    if num_fp8 and cache.k_swa is not None:
        raise ValueError(
            "an FP8 cache needs branches that share keys and values; this one has k_swa"
        )


def check_coarse(cache: LayerCache, spec: NSASpec) -> None:
    """Raise ValueError unless a cache has coarse keys exactly where the dialect has any."""
    if (cache.k_lse is None) != (spec.lse_len == 0):
        raise ValueError(
            "a cache has k_lse exactly where the dialect has coarse windows: got lse_len "
            f"{spec.lse_len} and a cache {'without' if cache.k_lse is None else 'with'} k_lse"
        )
    if cache.k_lse is not None:
        num_pages, num_kv_heads, page_size, head_dim = cache.k.shape
        entries = page_size // spec.lse_stride
        check_shape("cache.k_lse", cache.k_lse, (num_pages, num_kv_heads, entries, head_dim))
        if cache.k_lse.dtype != cache.k_cmp.dtype:
            raise ValueError(
                f"k_lse must have the dtype of k_cmp, {cache.k_cmp.dtype}, got {cache.k_lse.dtype}"
            )


def check_fp8_dims(head_dim: int, v_head_dim: int) -> None:
    """Raise ValueError for an FP8 cache that GPU kernels, as compiled, would read wrongly.

    Triton 3.6.0 makes wrong code of prefill for values of 16 or fewer beside wider keys: seen on an
    H200 with 32 and 16, and not with 16 and 16, 16 and 32, 64 and 64, 128 and 128.
    """
    if v_head_dim <= 16 < head_dim:
        raise ValueError(
            f"an FP8 cache of head_dim {head_dim} with v_head_dim {v_head_dim} is not supported on "
            "a GPU: v_head_dim must be above 16 where head_dim is"
        )


def check_branch_kv(branch_kv: BranchKV | None, cache: LayerCache, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless a branch has keys and values exactly where the cache has room."""
    rooms = (cache.k_swa, cache.v_swa, cache.k_tail, cache.v_tail)
    if (branch_kv is not None) != (rooms[0] is not None) or len({r is None for r in rooms}) > 1:
        raise ValueError(
            "branch_kv goes with a cache that has k_swa, v_swa, k_tail and v_tail: "
            f"got branch_kv {'given' if branch_kv is not None else 'missing'} and a cache with "
            f"{sum(r is not None for r in rooms)} of the four"
        )
    if branch_kv is not None:
        for name, tensor in (("k_cmp", branch_kv.k_cmp), ("k_swa", branch_kv.k_swa)):
            check_shape(f"branch_kv.{name}", tensor, tuple(k.shape))
        for name, tensor in (("v_cmp", branch_kv.v_cmp), ("v_swa", branch_kv.v_swa)):
            check_shape(f"branch_kv.{name}", tensor, tuple(v.shape))
