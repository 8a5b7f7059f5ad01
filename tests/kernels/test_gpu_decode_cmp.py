"""Decode compression attention with its append and selection, against the specification."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.gpu import decode_cmp as module
from nsa_kernels.gpu.decode_cmp import CmpPartials, decode_cmp, num_cmp_splits
from nsa_kernels.metadata import BranchKV, LayerCache
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE
from tests.kernels.problem import FLA, LEGACY, MAX_POOL, NO_WINDOW, PAPER

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# fp32 differs in summation order alone; bf16 and fp16 round probabilities.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}
SPECS = {
    "paper": PAPER,
    "fla": FLA,
    "legacy": LEGACY,
    "no_window": NO_WINDOW,
    "max_pool": MAX_POOL,
    "long_windows": NSASpec(cmp_len=48, cmp_stride=16, block_size=64, num_selected_blocks=4),
    "small_stride": NSASpec(cmp_len=8, cmp_stride=4, block_size=128, num_selected_blocks=3),
}
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")


@dataclass
class Problem:
    """Rows whose last token is still to be appended, in scattered pages of a cache of NaN."""

    spec: NSASpec
    cache: LayerCache
    q: Tensor  # [Nd, HQ, D]
    k: list[Tensor]  # of each row [n, H, D]
    v: list[Tensor]
    raw: list[tuple[Tensor, Tensor]]  # what is compressed
    swa: list[tuple[Tensor, Tensor]]
    seq_lens: list[int]
    page_table: Tensor
    softmax_scale: float

    def run(self, **options: Any) -> CmpPartials:
        """Run the kernel; padding rows get a token too, which must go nowhere."""
        heads = self.cache.k.shape[1]
        counters = torch.zeros(len(self.seq_lens) * heads, dtype=torch.int32, device=DEVICE)
        is_separate = self.cache.k_swa is not None

        def last(rows: list[Tensor]) -> Tensor:
            tokens = torch.stack([row[-1] for row in rows]).to(DEVICE, self.cache.k.dtype)
            # A view of a wider projection.
            return torch.cat((tokens, torch.full_like(tokens, torch.nan)), dim=1)[:, :heads]

        branch_kv = None
        if is_separate:
            branch_kv = BranchKV(
                last([k for k, _ in self.raw]),
                last([v for _, v in self.raw]),
                last([k for k, _ in self.swa]),
                last([v for _, v in self.swa]),
            )
        arguments = {
            "softmax_scale": self.softmax_scale,
            "counters": counters,
            "num_sms": 4,
            "check": True,
            "branch_kv": branch_kv,
            "swa_page_table": self.swa_page_table if is_separate else None,
        }
        partials = decode_cmp(
            self.q,
            last(self.k),
            last(self.v),
            self.cache,
            torch.tensor(self.seq_lens, dtype=torch.int32, device=DEVICE),
            self.page_table,
            self.spec,
            **(arguments | options),
        )
        assert not counters.any()
        return partials

    @property
    def swa_page_table(self) -> Tensor:
        """Other pages than those of page_table."""
        return (self.cache.k.shape[0] - self.page_table).where(self.page_table > 0, 0)

    def compressed(self, row: int) -> tuple[Tensor, Tensor]:
        """The row's windows as they should be in the cache: [N, H, D], [N, H, Dv] fp32."""
        k, v = (reference.compress_mean(x, self.spec) for x in self.raw[row])
        return k.to(self.cache.k.dtype).float(), v.to(self.cache.k.dtype).float()


def make_problem(
    spec: NSASpec,
    seq_lens: list[int],
    *,
    heads: int = 2,
    group: int = 3,
    dim: int = 16,
    v_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    separate: bool = False,
    spare_pages: int = 0,
    seed: int = 0,
) -> Problem:
    """Random rows; one of length 0 is padding."""
    generator = torch.Generator().manual_seed(seed)

    def rows(width: int) -> list[Tensor]:
        shapes = [(max(n, 1), heads, width) for n in seq_lens]
        return [torch.randn(*s, generator=generator).to(dtype).float() for s in shapes]

    size = spec.block_size
    width = max(-(-max(seq_lens) // size), 1) + spare_pages
    num_pages = sum(-(-n // size) for n in seq_lens) + 2
    free = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()
    page_table = torch.zeros(len(seq_lens), width, dtype=torch.int32)
    for row, n in enumerate(seq_lens):
        for page in range(-(-n // size)):
            page_table[row, page] = free.pop()

    def poison(tokens: int, dims: int) -> Tensor:
        return torch.full((num_pages, heads, tokens, dims), torch.nan, dtype=dtype)

    entries = spec.cmp_entries_per_page
    cache = LayerCache(
        poison(size, dim),
        poison(size, v_dim),
        poison(entries, dim),
        poison(entries, v_dim),
        poison(size, dim) if separate else None,
        poison(size, v_dim) if separate else None,
        poison(spec.cmp_len, dim) if separate else None,
        poison(spec.cmp_len, v_dim) if separate else None,
    )
    k, v = rows(dim), rows(v_dim)
    raw = (
        list(zip(rows(dim), rows(v_dim), strict=True)) if separate else list(zip(k, v, strict=True))
    )
    swa = (
        list(zip(rows(dim), rows(v_dim), strict=True)) if separate else list(zip(k, v, strict=True))
    )
    problem = Problem(
        spec=spec,
        cache=cache,
        q=torch.randn(len(seq_lens), heads * group, dim, generator=generator) * 2,
        k=k,
        v=v,
        raw=raw,
        swa=swa,
        seq_lens=seq_lens,
        page_table=page_table,
        softmax_scale=dim**-0.5,
    )
    for row, n in enumerate(seq_lens):
        _fill(problem, row, n - 1)
    moved = [None if x is None else x.to(DEVICE) for x in _tensors(cache)]
    problem.cache = LayerCache(*moved)  # type: ignore[arg-type]
    problem.q = problem.q.to(DEVICE, dtype)
    problem.page_table = page_table.to(DEVICE)
    return problem


def _tensors(cache: LayerCache) -> list[Tensor | None]:
    return [
        cache.k, cache.v, cache.k_cmp, cache.v_cmp,
        cache.k_swa, cache.v_swa, cache.k_tail, cache.v_tail,
    ]  # fmt: skip


def _fill(problem: Problem, row: int, num_tokens: int) -> None:
    """Write what `num_tokens` tokens of a row leave in the cache."""
    if num_tokens <= 0:
        return
    spec, cache = problem.spec, problem.cache
    token, window = torch.arange(num_tokens), torch.arange(spec.num_windows(num_tokens))
    entry = window + spec.strides_per_window - 1
    pages, size, entries = problem.page_table, spec.block_size, spec.cmp_entries_per_page
    dtype = cache.k.dtype
    for pair, (k_cache, v_cache), table in (
        ((problem.k[row], problem.v[row]), (cache.k, cache.v), pages),
        (problem.swa[row], (cache.k_swa, cache.v_swa), problem.swa_page_table),
    ):
        for x, target in zip(pair, (k_cache, v_cache), strict=True):
            if target is not None:
                page = table[row, token // size].long()
                target[page, :, token % size] = x[:num_tokens].to(dtype)
    page = pages[row, entry // entries].long()
    for x, target, tail in zip(
        problem.raw[row], (cache.k_cmp, cache.v_cmp), (cache.k_tail, cache.v_tail), strict=True
    ):
        mean = reference.compress_mean(x[:num_tokens], spec)
        target[page, :, entry % entries] = mean.to(dtype)
        if tail is not None:
            # In order: a page's last tokens take the place of those before.
            swa_pages = problem.swa_page_table[row].tolist()
            for position in range(num_tokens):
                tail[swa_pages[position // size], :, position % spec.cmp_len] = x[position].to(
                    dtype
                )


def merged(partials: CmpPartials) -> tuple[Tensor, Tensor]:
    """Outputs and base-2 log-sum-exps of all splits together, as decode_slc merges them."""
    assert partials.o_part is not None
    lse2 = torch.logsumexp(partials.lse2_part * 0.6931471805599453, -1) / 0.6931471805599453
    weight = torch.exp2(partials.lse2_part - lse2[..., None]).nan_to_num()
    o_part = partials.o_part.where(weight[..., None] > 0, 0.0)
    return (o_part * weight[..., None]).sum(2).cpu(), lse2.cpu()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Error of the whole tensor; NaN counts as infinite."""
    error = (actual.float() - expected).norm() / expected.norm().clamp(min=1e-6)
    return float(error.nan_to_num(nan=torch.inf))


def check_row(problem: Problem, partials: CmpPartials, row: int) -> None:
    """Compare one row's output, log-sum-exps and blocks with the specification."""
    spec, length = problem.spec, problem.seq_lens[row]
    tolerance = TOLERANCE[problem.cache.k.dtype]
    k_cmp, v_cmp = problem.compressed(row)
    position = torch.tensor([length - 1])
    q = problem.q[row : row + 1].float().cpu()
    scale = problem.softmax_scale
    o, lse = reference.cmp_attention(q, k_cmp, v_cmp, position, spec, softmax_scale=scale)
    if partials.o_part is not None:
        actual, lse2 = merged(partials)
        if len(k_cmp):
            assert relative_error(actual[row], o[0]) < tolerance
            assert relative_error(lse2[row], lse[0] / 0.6931471805599453) < tolerance
        else:
            assert not actual[row].any()
            assert (lse2[row] == -torch.inf).all()
    if partials.block_indices is None or partials.block_pages is None:
        return
    num_blocks = -(-length // spec.block_size)
    scores = reference.block_scores(
        q, k_cmp, lse, position, spec, softmax_scale=scale, num_blocks=num_blocks
    )
    wanted = reference.select_blocks(scores, position, spec)[0]
    indices, pages = partials.block_indices[row].cpu(), partials.block_pages[row].cpu()
    table = problem.page_table[row].cpu()
    assert pages.equal(table[indices.clamp(min=0)].where(indices >= 0, 0))
    for head in range(len(indices)):
        mine = sorted(indices[head].tolist())
        best = sorted(wanted[head].tolist())
        if problem.cache.k.dtype == torch.float32:
            assert mine == best
        else:
            # Rounded keys are the same on both sides, but near ties may still go either way.
            assert len(set(mine)) == len(set(best))
            total = scores[0, head][[b for b in best if b >= 0]].sum()
            assert scores[0, head][[b for b in mine if b >= 0]].sum() >= total * (1 - 1e-4)


def check_cache(problem: Problem, before: list[Tensor | None]) -> None:
    """The new tokens and closed windows are in the cache, and nothing else changed."""
    expected = Problem(**{f: getattr(problem, f) for f in problem.__dataclass_fields__})
    expected.cache = LayerCache(*[None if x is None else x.clone() for x in before])  # type: ignore[arg-type]
    expected.page_table = problem.page_table.cpu()
    for row, length in enumerate(problem.seq_lens):
        _fill(expected, row, length)
    for actual, wanted in zip(_tensors(problem.cache), _tensors(expected.cache), strict=True):
        if actual is not None and wanted is not None:
            tolerance = 1e-6 if actual.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(
                actual.cpu(), wanted, equal_nan=True, rtol=tolerance, atol=tolerance
            )


def check(problem: Problem, **options: Any) -> CmpPartials:
    """Run, and check all rows and the cache."""
    before = [None if x is None else x.cpu().clone() for x in _tensors(problem.cache)]
    partials = problem.run(**options)
    check_cache(problem, before)
    for row, length in enumerate(problem.seq_lens):
        if length:
            check_row(problem, partials, row)
        else:
            assert (partials.lse2_part[row] == -torch.inf).all()
            assert partials.block_indices is None or (partials.block_indices[row] == -1).all()
            assert partials.block_pages is None or (partials.block_pages[row] == 0).all()
    return partials


def lengths_of(spec: NSASpec) -> list[int]:
    """Lengths around the first window, a window's end, and several pages; padding in between."""
    first, size = spec.cmp_len, spec.block_size
    return [1, first - 1, first, 0, 3 * size, 3 * size + 1, 9 * size + first % size + 1]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("splits", [1, 3])
def test_dialects(name: str, splits: int) -> None:
    check(make_problem(SPECS[name], lengths_of(SPECS[name])), splits=splits)


def test_separate_keys_and_values() -> None:
    problem = make_problem(PAPER, [1, 31, 32, 0, 97, 192, 400], separate=True)
    check(problem, splits=2)
    with pytest.raises(ValueError, match="branch_kv and swa_page_table"):
        problem.run(branch_kv=None)


@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize(("dim", "v_dim"), [(60, 60), (192, 128)])
def test_group_sizes_and_head_dims(group: int, dim: int, v_dim: int) -> None:
    check(make_problem(PAPER, [352, 130], heads=1, group=group, dim=dim, v_dim=v_dim), splits=2)


def test_more_splits_than_tiles_leave_empty_ones() -> None:
    partials = check(make_problem(FLA, [40, 2100], spare_pages=10), splits=3, tile_entries=64)
    assert torch.isinf(partials.lse2_part[0, :, 1:]).all()
    assert torch.isfinite(partials.lse2_part[1]).all()


def test_wider_tiles() -> None:
    check(make_problem(PAPER, [1500, 1504]), splits=2, tile_entries=128)


def test_selection_of_a_long_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of blocks, in parallel; the last to finish merges what they picked."""
    monkeypatch.setattr(module, "CHUNK_BLOCKS", 128)
    spec = replace(PAPER, cmp_len=16, block_size=16)
    lengths = [0, 30, 16 * 300 + 1]
    check(make_problem(spec, lengths, heads=1), splits=2)


def test_outputs_that_nobody_wants() -> None:
    partials = check(make_problem(PAPER, [96, 700]), with_selection=False)
    assert partials.block_indices is None
    partials = check(make_problem(PAPER, [96, 700]), with_output=False)
    assert partials.o_part is None
    partials = check(make_problem(PAPER, [96, 700]), with_output=False, with_selection=False)
    assert partials.o_part is None and partials.block_indices is None


def test_without_append_nothing_is_written() -> None:
    problem = make_problem(PAPER, [96, 700])
    problem.run()
    check(problem, fuse_append=False)


def test_no_rows() -> None:
    problem = make_problem(PAPER, [96])
    problem.q, problem.seq_lens = problem.q[:0], [96]
    partials = decode_cmp(
        problem.q,
        problem.q[:, :2],
        problem.q[:, :2],
        problem.cache,
        torch.tensor([96], dtype=torch.int32, device=DEVICE),
        problem.page_table,
        PAPER,
        softmax_scale=1.0,
        counters=torch.zeros(0, dtype=torch.int32, device=DEVICE),
        num_sms=132,
    )
    assert partials.lse2_part.shape[0] == 0


def test_splits_follow_the_shapes() -> None:
    assert num_cmp_splits(1, 4, 64, 132) == 32
    assert num_cmp_splits(32, 4, 64, 132) == 3
    assert num_cmp_splits(512, 4, 64, 132) == 1
    assert num_cmp_splits(512, 4, 1024, 132) == 4
    assert num_cmp_splits(1, 4, 3, 132) == 3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [1, 6, 8, 16, 64])
@pytest.mark.parametrize(("dim", "v_dim"), [(128, 128), (192, 128), (80, 80)])
def test_full_size(dtype: torch.dtype, group: int, dim: int, v_dim: int) -> None:
    lengths = [8000, 0, 8192, 5, 4097, 8191]
    check(make_problem(NSASpec(), lengths, group=group, dim=dim, v_dim=v_dim, dtype=dtype))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dialects_at_full_size(name: str, dtype: torch.dtype) -> None:
    problem = make_problem(SPECS[name], [4096, 3001, 1], group=16, dim=128, v_dim=128, dtype=dtype)
    check(problem)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("max_blocks", [1000, 3000])
def test_tables_of_long_models(max_blocks: int) -> None:
    check(make_problem(NSASpec(), [64000, 700], heads=1, group=16, dim=64, v_dim=64,
                       dtype=torch.bfloat16, spare_pages=max_blocks))  # fmt: skip
