"""Sliding-window attention of prefill chunks against the specification."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.gpu.common import prefill_block_q
from nsa_kernels.gpu.prefill_swa import SwaTuning, prefill_swa
from nsa_kernels.metadata import LayerCache, build_metadata
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE

# fp32 differs by summation order; 16-bit types round probabilities and the output.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _loop_bounds_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter loop up to a loaded value, which it keeps in an array of one."""
    if DEVICE.type == "cuda":
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def make_spec(block_size: int = 16, window_size: int = 24) -> NSASpec:
    return NSASpec(cmp_len=8, cmp_stride=8, block_size=block_size, window_size=window_size)


def check_prefill(
    spec: NSASpec,
    starts: list[int],
    lens: list[int],
    *,
    num_decode_rows: int = 0,
    heads: int = 1,
    group: int = 16,
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    separate: bool = False,
    tuning: SwaTuning | None = None,
    compared: int | None = None,
) -> None:
    """Run chunks of lens[b] tokens after starts[b], and compare (the last `compared` of) each.

    Whatever no query of the chunk sees is NaN in the cache, and nothing else may be written.
    """
    generator = torch.Generator().manual_seed(sum(lens))
    size, scale = spec.block_size, dims[0] ** -0.5

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    totals = [start + n for start, n in zip(starts, lens, strict=True)]
    counts = [-(-total // size) for total in totals]
    num_pages = sum(counts) + 1
    shuffled = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()
    pages = [[shuffled.pop() for _ in range(count)] for count in counts]
    k = [randn(total, heads, dims[0]) for total in totals]
    v = [randn(total, heads, dims[1]) for total in totals]
    caches = [torch.full((num_pages, heads, size, dim), torch.nan, dtype=dtype) for dim in dims]
    for row, owned in enumerate(pages):
        oldest = max(0, starts[row] - spec.window_size + 1)
        for position in range(oldest, totals[row]):
            caches[0][owned[position // size], :, position % size] = k[row][position]
            caches[1][owned[position // size], :, position % size] = v[row][position]
        if separate:
            pages[row] = [0 if (i + 1) * size <= oldest else page for i, page in enumerate(owned)]
    pair = [cache.to(DEVICE) for cache in caches]
    unused = [torch.empty(0, heads, 0, dim, dtype=dtype, device=DEVICE) for dim in dims]
    cache = LayerCache(*pair, *unused)
    if separate:
        nothing = [torch.full_like(x, torch.nan) for x in pair]
        cache = LayerCache(*nothing, *unused, *pair, *unused)
    meta = build_metadata(pages, starts, lens, spec, num_decode_rows=num_decode_rows)
    block_q = prefill_block_q(group)
    tiles = [
        (row, int(meta.cu_seqlens_q[row]) + offset)
        for row in range(num_decode_rows, len(lens))
        for offset in range(0, lens[row], block_q)
    ]
    tile_rows, tile_starts = torch.tensor(tiles, dtype=torch.int32).T.contiguous().to(DEVICE)
    num_tokens, num_q_heads = sum(lens), heads * group
    # A view of a fused projection, as the model passes it.
    fused = randn(num_tokens, num_q_heads * dims[0] + 8) * 2
    q = fused[:, 8:].unflatten(1, (num_q_heads, dims[0]))
    out = torch.full((num_tokens, num_q_heads, dims[1]), torch.nan, dtype=dtype, device=DEVICE)
    prefill_swa(
        fused.to(DEVICE)[:, 8:].unflatten(1, (num_q_heads, dims[0])),
        cache,
        spec,
        tile_rows=tile_rows,
        tile_starts=tile_starts,
        cu_seqlens_q=meta.cu_seqlens_q.to(DEVICE),
        seq_lens=meta.seq_lens.to(DEVICE),
        page_table=meta.page_table.to(DEVICE),
        softmax_scale=scale,
        out=out,
        check=True,
        tuning=tuning,
    )
    actual = out.cpu().float()
    for row, (chunk, q_row) in enumerate(zip(actual.split(lens), q.split(lens), strict=True)):
        if row < num_decode_rows:
            assert chunk.isnan().all(), "a decode row was written"
            continue
        last = slice(-compared, None) if compared else slice(None)
        positions = torch.arange(starts[row], totals[row])[last]
        # Older tokens are out of every window: leave them out, so that full sizes are checkable.
        oldest = max(0, int(positions[0]) - spec.window_size + 1)
        expected, _ = reference.swa_attention(
            q_row[last],
            k[row][oldest:],
            v[row][oldest:],
            positions - oldest,
            spec,
            softmax_scale=scale,
        )
        error = (chunk[last] - expected).norm() / expected.norm()
        assert error <= TOLERANCE[dtype], f"row {row}: relative error {error:.3g}"


@pytest.mark.parametrize("group", [1, 3, 6, 16, 64])
def test_ragged_chunks_of_any_group(group: int) -> None:
    check_prefill(make_spec(), [0, 5, 61], [1, 37, 9], group=group, heads=2)


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("window_size", [1, 13, 64])
def test_windows_and_pages(block_size: int, window_size: int) -> None:
    check_prefill(make_spec(block_size, window_size), [0, 131], [66, 19], group=8)


@pytest.mark.parametrize("block_n", [16, 32, 64, 128])
def test_key_tiles(block_n: int) -> None:
    tuning = SwaTuning(block_n=block_n, num_warps=4, num_stages=2)
    check_prefill(make_spec(32, 100), [3, 130], [40, 70], group=2, tuning=tuning)


@pytest.mark.parametrize("dims", [(60, 60), (48, 16), (80, 24), (24, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_widths_and_dtypes(dims: tuple[int, int], dtype: torch.dtype) -> None:
    check_prefill(make_spec(), [17], [21], dims=dims, dtype=dtype)


def test_decode_rows_are_left_alone() -> None:
    check_prefill(make_spec(), [20, 40, 3], [1, 1, 18], num_decode_rows=2)


def test_pages_of_its_own_with_freed_ones() -> None:
    check_prefill(make_spec(8, 11), [0, 50, 33], [9, 12, 5], separate=True)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="no window branch"):
        check_prefill(make_spec(window_size=0), [0], [4])
    cache = LayerCache(*(torch.empty(2, 1, 16, dim) for dim in (8, 8, 8, 8)))
    q, index = torch.empty(3, 2, 16), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"k must have shape \(2, 1, 16, 16\)"):
        prefill_swa(
            q,
            cache,
            make_spec(),
            tile_rows=index,
            tile_starts=index,
            cu_seqlens_q=index,
            seq_lens=index,
            page_table=index,
            softmax_scale=1.0,
            out=torch.empty(3, 2, 8),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (60, 60), (96, 96), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_full_size(dims: tuple[int, int], dtype: torch.dtype) -> None:
    spec = make_spec(64, 512)
    check_prefill(
        spec, [0, 700], [1500, 333], dims=dims, dtype=dtype, heads=4, group=16, compared=300
    )


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 3, 8, 64])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_full_size_groups(group: int, block_size: int) -> None:
    spec = make_spec(block_size, 512)
    check_prefill(
        spec, [0, 700], [1500, 333], dims=(64, 64), dtype=torch.bfloat16, heads=2, group=group
    )
