"""Prefill's selected attention with its inverted index, merge and gated sum, against the spec."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.gpu.prefill_index import build_index, entry_base, num_free_blocks
from nsa_kernels.gpu.prefill_merge import combine
from nsa_kernels.gpu.prefill_slc import default_tuning, prefill_slc, sub_chunk_tokens
from nsa_kernels.metadata import LayerCache
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# bf16: inputs are exact on both sides; probabilities, partial results and the output are rounded.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}

PAPER = NSASpec(num_selected_blocks=5, window_size=96)


def block_spec(
    block_size: int, num_selected: int, *, num_init: int = 1, num_local: int = 2
) -> NSASpec:
    """Nothing but the blocks matters here: the compression is the simplest that fits."""
    return NSASpec(
        cmp_len=block_size,
        cmp_stride=block_size,
        block_size=block_size,
        num_selected_blocks=num_selected,
        num_init_blocks=num_init,
        num_local_blocks=num_local,
    )


@dataclass
class Step:
    """Rows that add tokens starts[b] .. lengths[b] - 1, on the device, and the expected result."""

    spec: NSASpec
    starts: list[int]
    lengths: list[int]
    q: Tensor
    gates: Tensor
    o_cmp: Tensor
    o_swa: Tensor
    cache: LayerCache
    block_indices: Tensor
    token_rows: Tensor
    positions: Tensor
    seq_lens: Tensor
    page_table: Tensor
    cu_blocks: Tensor
    o_slc: Tensor
    softmax_scale: float

    @property
    def num_blocks(self) -> int:
        """Blocks of all rows."""
        return int(self.cu_blocks[-1])

    def run(
        self,
        *,
        first: int = 0,
        stop: int | None = None,
        gates: Tensor | tuple[float, float, float] | None = None,
        out: Tensor | None = None,
        with_others: bool = True,
        **options: object,
    ) -> Tensor:
        """Run the operator for tokens [first, stop); the rest of `out` stays NaN."""
        if out is None:
            shape = (*self.q.shape[:2], self.cache.v.shape[3])
            out = torch.full(shape, torch.nan, dtype=self.q.dtype, device=DEVICE)
        prefill_slc(
            self.q,
            self.block_indices[first:stop],
            self.o_cmp if with_others else None,
            self.o_swa if with_others else None,
            self.gates if gates is None else gates,
            self.cache,
            self.token_rows,
            self.positions,
            self.seq_lens,
            self.page_table,
            self.cu_blocks,
            self.spec,
            num_blocks=self.num_blocks,
            softmax_scale=self.softmax_scale,
            first_token=first,
            out=out,
            **options,
        )
        return out

    def expected(self, gates: Tensor | None = None, with_others: bool = True) -> Tensor:
        """The specification's result."""
        gates = self.gates.float().cpu() if gates is None else gates
        others = [branch.float().cpu() * with_others for branch in (self.o_cmp, self.o_swa)]
        return reference.combine(others[0], self.o_slc, others[1], gates)


def choose(positions: Tensor, heads: int, spec: NSASpec, generator: torch.Generator) -> Tensor:
    """Select by random scores, then shuffle every query's blocks: the order is no promise."""
    num_blocks = int(positions.max()) // spec.block_size + 1
    scores = torch.rand(len(positions), heads, num_blocks, generator=generator)
    indices = reference.select_blocks(scores, positions, spec)
    order = torch.rand(indices.shape, generator=generator).argsort(dim=-1)
    return indices.gather(-1, order)


def make_step(
    spec: NSASpec,
    starts: list[int],
    lengths: list[int],
    *,
    heads: int = 2,
    group: int = 3,
    dim: int = 16,
    v_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Step:
    """Random rows in shuffled pages; whatever a row has not written is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    size = spec.block_size
    counts = [-(-length // size) for length in lengths]
    num_pages = sum(counts) + 3
    free = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()
    k_cache = torch.full((num_pages, heads, size, dim), torch.nan, dtype=dtype)
    v_cache = torch.full((num_pages, heads, size, v_dim), torch.nan, dtype=dtype)
    page_table = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    num_tokens = sum(lengths) - sum(starts)
    # q is a view of a wider projection.
    q = randn(num_tokens, heads * group * dim + 8)[:, 8:].unflatten(1, (heads * group, dim)) * 2
    rows, all_positions, indices, outputs = [], [], [], []
    scale = dim**-0.5
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        k, v = randn(length, heads, dim), randn(length, heads, v_dim)
        for block in range(counts[row]):
            page = free.pop()
            page_table[row, block] = page
            part = slice(block * size, min((block + 1) * size, length))
            k_cache[page, :, : part.stop - part.start] = k[part].transpose(0, 1)
            v_cache[page, :, : part.stop - part.start] = v[part].transpose(0, 1)
        positions = torch.arange(start, length)
        chosen = choose(positions, heads, spec, generator)
        first = sum(lengths[:row]) - sum(starts[:row])
        o_slc, _ = reference.slc_attention(
            q[first : first + length - start], k, v, chosen, positions, spec, softmax_scale=scale
        )
        rows += [row] * (length - start)
        all_positions.append(positions)
        indices.append(chosen)
        outputs.append(o_slc)
    cu_blocks = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    no_entries = torch.empty(num_pages, heads, spec.cmp_entries_per_page, 0, device=DEVICE)
    device_q = torch.empty_strided(q.shape, q.stride(), dtype=dtype, device=DEVICE).copy_(q)
    return Step(
        spec=spec,
        starts=starts,
        lengths=lengths,
        q=device_q,
        gates=torch.rand(num_tokens, heads * group, 3, generator=generator).to(DEVICE, dtype),
        o_cmp=randn(num_tokens, heads * group, v_dim).to(DEVICE),
        o_swa=randn(num_tokens, heads * group, v_dim).to(DEVICE),
        cache=LayerCache(k_cache.to(DEVICE), v_cache.to(DEVICE), no_entries, no_entries),
        block_indices=torch.cat(indices).to(DEVICE),
        token_rows=torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        positions=torch.cat(all_positions).to(DEVICE, torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        page_table=page_table.to(DEVICE),
        cu_blocks=cu_blocks.to(DEVICE),
        o_slc=torch.cat(outputs),
        softmax_scale=scale,
    )


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Relative error of the whole tensor, which also fails on NaN."""
    assert actual.shape == expected.shape
    error = (actual.float().cpu() - expected).norm() / expected.norm().clamp(min=1e-6)
    assert error <= TOLERANCE[dtype], f"relative error {error:.3g} > {TOLERANCE[dtype]}"


@pytest.mark.parametrize(
    ("spec", "group", "dims"),
    [
        (block_spec(8, 6), 3, (16, 16)),
        (block_spec(16, 4, num_init=0, num_local=1), 16, (16, 16)),
        (block_spec(32, 5, num_init=2, num_local=1), 1, (60, 60)),
        (PAPER, 3, (192, 128)),
        (block_spec(128, 4), 1, (16, 16)),
    ],
    ids=["8", "16", "32", "64", "128"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ragged_rows(spec: NSASpec, group: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    size = spec.block_size
    # A whole short prompt, a chunk in the middle of a block, one that is far along.
    starts, lengths = [0, 2 * size - 3, 9 * size], [size + 1, 2 * size + 4, 9 * size + 7]
    step = make_step(spec, starts, lengths, group=group, dim=dims[0], v_dim=dims[1], dtype=dtype)
    assert_close(step.run(check=True), step.expected(), dtype)


def test_a_whole_prompt_in_sub_chunks() -> None:
    step = make_step(block_spec(16, 6), [0, 90], [110, 117], heads=1)
    parts = None
    for first in range(0, len(step.q), 47):
        parts = step.run(first=first, stop=first + 47, out=parts)
    assert parts is not None
    assert_close(parts, step.expected(), torch.float32)
    if DEVICE.type == "cuda":  # NumPy's matrix product depends on where a row lies in its tile.
        assert torch.equal(parts, step.run())


def test_only_the_sub_chunk_is_written() -> None:
    step = make_step(block_spec(16, 6), [0, 40], [50, 101])
    out = step.run(first=30, stop=61)
    assert out[:30].isnan().all() and out[61:].isnan().all()
    assert_close(out[30:61], step.expected()[30:61], torch.float32)


@pytest.mark.parametrize("queries_per_item", [1, 3, 64])
def test_long_lists_make_several_items(queries_per_item: int) -> None:
    step = make_step(block_spec(16, 4, num_init=0, num_local=1), [200], [240], heads=1)
    tuning = replace(default_tuning(3, 16, 16, torch.float32), queries_per_item=queries_per_item)
    assert_close(step.run(tuning=tuning), step.expected(), torch.float32)


def test_index_lists_every_free_choice_once() -> None:
    spec = block_spec(16, 6)
    step = make_step(spec, [0, 100], [120, 161])
    index = build_index(
        step.block_indices,
        step.token_rows,
        step.positions,
        step.page_table,
        step.cu_blocks,
        num_blocks=step.num_blocks,
        num_pages=step.cache.k.shape[0],
        spec=spec,
        first_token=0,
        queries_per_item=4,
    )
    num_entries, num_items = index.totals.tolist()
    assert num_entries == int(index.num_free.sum())
    found = set()
    for page, head, first, count in index.items[:num_items].tolist():
        assert 1 <= count <= 4
        for entry in index.lists[first : first + count].tolist():
            found.add((entry // entry_base(1 + num_free_blocks(spec)), head, page))
    assert len(found) == num_entries
    for token, head, page in found:
        pages = step.page_table[step.token_rows[token]][step.block_indices[token, head].long()]
        assert page in pages.tolist()


def test_all_blocks_forced() -> None:
    spec = block_spec(16, 3)
    step = make_step(spec, [70], [90])
    assert num_free_blocks(spec) == 0
    assert_close(step.run(), step.expected(), torch.float32)


def test_gates_and_missing_branches() -> None:
    step = make_step(block_spec(16, 5), [93], [101])
    shape = (*step.q.shape[:2], 3)
    # Logits, a slice of a fused projection.
    logits = torch.randn(*shape[:2], 5, device=DEVICE)[..., 1:4]
    expected = step.expected(logits.float().sigmoid().cpu())
    assert_close(step.run(gates=logits, sigmoid_gates=True), expected, torch.float32)
    expected = step.expected(torch.tensor((0.5, 2.0, 0.25)).expand(shape))
    assert_close(step.run(gates=(0.5, 2.0, 0.25)), expected, torch.float32)
    expected = step.expected(torch.tensor((0.0, 1.0, 0.0)).expand(shape), with_others=False)
    assert_close(step.run(gates=(0.0, 1.0, 0.0), with_others=False), expected, torch.float32)


def test_combine_without_the_selected_branch() -> None:
    step = make_step(block_spec(16, 5), [50], [110])
    out = torch.full_like(step.o_cmp, torch.nan)
    combine(
        step.o_cmp, step.o_swa, step.gates, num_kv_heads=2, first_token=10, num_tokens=50, out=out
    )
    step.o_slc = torch.zeros_like(step.o_slc)
    assert_close(out[10:60], step.expected()[10:60], torch.float32)
    assert out[:10].isnan().all() and out[60:].isnan().all()


def test_padding_rows_get_zeros() -> None:
    step = make_step(block_spec(16, 5), [0, 80, 0], [10, 90, 6])
    step.seq_lens[2] = 0
    step.block_indices[-6:] = -1
    step.page_table[2] = 0
    out = step.run(gates=(0.0, 1.0, 0.0), with_others=False)
    assert_close(out[:-6], step.o_slc[:-6], torch.float32)
    assert (out[-6:] == 0).all()


def test_sub_chunk_tokens_keep_the_bound() -> None:
    shape = {"num_q_heads": 64, "num_kv_heads": 4, "v_head_dim": 128, "dtype": torch.bfloat16}
    tokens = sub_chunk_tokens(1 << 30, NSASpec(), **shape)
    # 1 + 13 partial results of 64 heads, 128 values of 2 bytes and a log-sum-exp each.
    assert 0.98 * (1 << 30) < tokens * 14 * 64 * (256 + 4) < 1 << 30
    assert sub_chunk_tokens(1, NSASpec(), **shape) == 16


def test_wrong_shapes_name_the_tensor() -> None:
    step = make_step(block_spec(16, 5), [0], [20])
    step.block_indices = step.block_indices[..., :4]
    with pytest.raises(ValueError, match=r"block_indices must have shape \(20, 2, 5\)"):
        step.run()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group", "dims", "size"),
    [
        (16, (128, 128), 64),
        (16, (128, 128), 128),
        (16, (192, 128), 64),
        (16, (64, 64), 16),
        (1, (128, 128), 32),
        (6, (80, 96), 64),
        (8, (256, 256), 64),
        (64, (64, 64), 32),
        (2, (256, 256), 128),
    ],
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_full_size(group: int, dims: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    spec = block_spec(size, 8)
    starts, lengths = [0, 40 * size + 3, 37], [12 * size + 5, 42 * size, 38]
    step = make_step(
        spec, starts, lengths, heads=2, group=group, dim=dims[0], v_dim=dims[1], dtype=dtype
    )
    out = step.run()
    assert_close(out, step.expected(), dtype)
    assert torch.equal(step.run(), out), "the order of the lists must not show"
