"""Decode in one kernel: the same selection, outputs and cache as the kernels it stands for."""

import dataclasses

import pytest
import torch
from torch import Tensor

from nsa_kernels.gpu import attention
from nsa_kernels.gpu import decode_short as module
from nsa_kernels.gpu.decode_cmp import decode_cmp
from nsa_kernels.gpu.decode_short import ShortLimits, can_decode_short, decode_short
from nsa_kernels.gpu.decode_slc import decode_slc
from nsa_kernels.metadata import LayerCache
from nsa_kernels.ops import Branches
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE
from tests.kernels.problem import FLA, INFLLM, LEGACY, MAX_POOL, PAPER, assert_close
from tests.kernels.test_gpu_static_decode import make, make_plan, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LLAMA_NSA = NSASpec(
    cmp_len=16,
    cmp_stride=16,
    block_size=16,
    num_init_blocks=0,
    num_local_blocks=1,
    window_size=128,
    selection="fla_legacy",
)
SPECS = {
    "fla": FLA,
    "legacy": LEGACY,
    "llama-nsa": LLAMA_NSA,
    "forced": NSASpec(
        cmp_len=8, cmp_stride=8, block_size=8, num_selected_blocks=5, num_init_blocks=2,
        num_local_blocks=3, window_size=20,
    ),
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Case:
    """Rows whose last token is not in the cache yet; what no row owns is NaN or no page."""

    def __init__(
        self,
        spec: NSASpec,
        seq_lens: list[int],
        *,
        num_pages: int,
        dtype: torch.dtype = torch.float32,
        heads: int = 2,
        group: int = 3,
        dims: tuple[int, int] = (16, 16),
        equal_keys: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(seq_lens))
        self.spec, self.seq_lens, self.dims = spec, seq_lens, dims
        rows, size = len(seq_lens), spec.block_size

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        used = [-(-n // size) for n in seq_lens]
        ids = (torch.randperm(sum(used), generator=generator) + 1).tolist()
        table = torch.full((rows, num_pages + 3), 1 << 30, dtype=torch.int32)
        caches = [
            torch.full((sum(used) + 1, heads, n, d), torch.nan) for n in (size, 1) for d in dims
        ]
        for row, (count, seq_len) in enumerate(zip(used, seq_lens, strict=True)):
            mine = [ids.pop() for _ in range(count)]
            table[row, :count] = torch.tensor(mine, dtype=torch.int32)
            for raw, compressed in (caches[::2], caches[1::2]):
                width = raw.shape[3]
                tokens = randn(count * size, heads, width)
                if equal_keys:
                    # Integers: products and their sums are exact in whatever order.
                    tokens = randn(size, heads, width).round().repeat(count, 1, 1)
                pages = tokens.view(count, size, heads, width).transpose(1, 2).to(dtype)
                for index, page in enumerate(mine):
                    held = max(min(size, seq_len - 1 - index * size), 0)
                    raw[page, :, :held] = pages[index, :, :held].float()
                    if held == size:
                        compressed[page, :, 0] = pages[index].float().mean(dim=1).to(dtype).float()
        # Of keys, values, and what is compressed of either.
        tensors = [x.to(DEVICE, dtype) for x in caches]
        self.cache = LayerCache(*tensors)
        self.page_table = table.to(DEVICE)[:, :num_pages]
        self.lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
        self.q = (randn(rows, heads * group, dims[0]) * 2).to(DEVICE, dtype)
        self.k = randn(rows, heads, dims[0]).to(DEVICE, dtype)
        self.v = randn(rows, heads, dims[1]).to(DEVICE, dtype)
        self.gates = randn(rows, heads * group, 3).to(DEVICE, dtype)
        if equal_keys:
            self.q = self.q.round()

    def copy_of_cache(self) -> LayerCache:
        names = ("k", "v", "k_cmp", "v_cmp")
        return LayerCache(*(getattr(self.cache, name).clone() for name in names))

    def short(self) -> tuple[Tensor, Tensor, LayerCache]:
        cache, rows = self.copy_of_cache(), len(self.seq_lens)
        shape = (rows, cache.k.shape[1], self.spec.num_selected_blocks)
        indices = torch.empty(shape, dtype=torch.int32, device=DEVICE)
        out = decode_short(
            self.q, self.k, self.v, self.gates, cache, self.lens, self.page_table, self.spec,
            softmax_scale=0.3, sigmoid_gates=True, block_indices=indices, check=True,
        )  # fmt: skip
        return out, indices, cache

    def long(self) -> tuple[Tensor, Tensor, LayerCache]:
        cache = self.copy_of_cache()
        counters = torch.zeros(
            2, self.q.shape[0] * self.q.shape[1], dtype=torch.int32, device=DEVICE
        )
        partials = decode_cmp(
            self.q, self.k, self.v, cache, self.lens, self.page_table, self.spec,
            softmax_scale=0.3, counters=counters[0], num_sms=4, check=True,
        )  # fmt: skip
        assert partials.block_indices is not None
        out = decode_slc(
            self.q, self.gates, cache, self.lens, self.page_table, self.spec,
            softmax_scale=0.3, counters=counters[1], num_sms=4, branches=Branches(),
            block_indices=partials.block_indices, block_pages=partials.block_pages,
            o_part=partials.o_part, lse2_part=partials.lse2_part, sigmoid_gates=True, check=True,
        )  # fmt: skip
        return out, partials.block_indices, cache

    def compare(self, *, is_exact: bool = True) -> None:
        out, indices, cache = self.short()
        expected, expected_indices, expected_cache = self.long()
        padding = [row for row, seq_len in enumerate(self.seq_lens) if not seq_len]
        assert (indices[padding] == -1).all()
        assert not out[padding].any()
        if is_exact:
            assert torch.equal(indices.sort().values, expected_indices.sort().values)
        assert_close(out.cpu(), expected.float().cpu(), TOLERANCE[out.dtype])
        for name in ("k", "v", "k_cmp", "v_cmp"):
            mine, theirs = getattr(cache, name), getattr(expected_cache, name)
            torch.testing.assert_close(mine, theirs, rtol=0.01, atol=1e-6, equal_nan=True)


def lengths_of(spec: NSASpec) -> list[int]:
    """Padding, the first tokens, the ends of a page, of the window and of what fits into S."""
    size, full = spec.block_size, spec.num_selected_blocks * spec.block_size
    ends = [0, 1, 2, size - 1, size, size + 1, spec.window_size, spec.window_size + 1]
    return [*ends, full, full + 1, 2 * full - 1, 2 * full, 2 * full + size, 3 * full + size + 3, 0]


@pytest.mark.parametrize("name", SPECS)
def test_same_as_three_kernels(name: str) -> None:
    spec = SPECS[name]
    lengths = lengths_of(spec)
    if name == "llama-nsa":  # the interpreter's time
        lengths = [0, 15, 128, 257, 272, 529, 800]
    num_pages = -(-max(lengths) // spec.block_size)
    Case(spec, lengths, num_pages=num_pages).compare()


@pytest.mark.parametrize(
    ("group", "dims"), [(1, (16, 16)), (5, (24, 16)), (16, (64, 64)), (20, (16, 40))]
)
def test_group_sizes_and_head_dims(group: int, dims: tuple[int, int]) -> None:
    Case(LEGACY, [70, 8, 200], num_pages=31, group=group, dims=dims).compare()


def test_long_table_and_many_candidates() -> None:
    """Candidates beyond one round of ranking, and most of the table beyond the rows."""
    Case(LEGACY, [8 * 255 + 7, 8 * 140], num_pages=256).compare()
    Case(SPECS["forced"], [8 * 256], num_pages=256).compare()


@pytest.mark.parametrize("name", ["fla", "legacy"])
def test_equal_scores_go_to_the_lower_block(name: str) -> None:
    spec = SPECS[name]
    case = Case(spec, [20 * spec.block_size + 3], num_pages=24, equal_keys=True)
    _, indices, _ = case.short()
    num_blocks = 21
    if name == "legacy":
        present = (num_blocks - 1) // 8 * 8
        # Half of the past; of the present its local block, which counts as the best.
        chosen = [*range(4), present, present + 1, present + 2, num_blocks - 1]
    else:
        num_free = spec.num_selected_blocks - spec.num_init_blocks - spec.num_local_blocks
        forced = [*range(spec.num_init_blocks)]
        forced += [*range(num_blocks - spec.num_local_blocks, num_blocks)]
        chosen = [*range(spec.num_init_blocks, spec.num_init_blocks + num_free), *forced]
    for head in indices[0].tolist():
        assert sorted(head) == sorted(chosen)


def test_bf16() -> None:
    Case(LEGACY, [70, 8, 203], num_pages=31, dtype=torch.bfloat16, dims=(64, 64)).compare()


def test_nan_goes_on() -> None:
    case = Case(LEGACY, [70, 71], num_pages=31)
    case.q[0, 0] = torch.nan
    out, _, _ = case.short()
    assert out[0, 0].isnan().all()
    assert not out[0, 1:].isnan().any()
    assert not out[1].isnan().any()


def test_operator_takes_it_by_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch instead of three, and the same result; a plan may forbid it."""
    calls = []
    monkeypatch.setattr(
        attention, "decode_short", lambda *a, **k: calls.append(1) or decode_short(*a, **k)
    )
    problem, rows = make(LEGACY)
    plan = make_plan(problem, rows, 40)
    output = run(problem, plan, rows)
    assert calls == [1]
    without = dataclasses.replace(plan, short_limits=ShortLimits(pages=0))
    assert_close(run(problem, without, rows), output)
    assert calls == [1]


def test_rule() -> None:
    def allows(spec: NSASpec, *, shape: tuple[int, int] = (1, 128), **options: object) -> bool:
        entries, size = spec.cmp_entries_per_page, spec.block_size
        sizes = [(size, 64), (size, 64), (entries, 64), (entries, 64)]
        cache = LayerCache(*(torch.zeros(1, 2, n, d, dtype=torch.bfloat16) for n, d in sizes))
        values: dict[str, object] = {
            "branches": Branches(),
            "dtype": torch.bfloat16,
            "num_q_heads": 32,
            "limits": ShortLimits(),
            **options,
        }
        branches = values.pop("branches")
        return can_decode_short(spec, cache, branches, shape=shape, **values)  # type: ignore[arg-type]

    assert allows(LLAMA_NSA)
    assert allows(LLAMA_NSA, shape=(8, module.MAX_PAGES))
    assert not allows(LLAMA_NSA, shape=(9, 128))
    assert not allows(LLAMA_NSA, shape=(1, module.MAX_PAGES + 1))
    assert not allows(LLAMA_NSA, branches=Branches(swa=False))
    assert not allows(LLAMA_NSA, dtype=torch.float32)
    assert not allows(LLAMA_NSA, num_q_heads=2 * (module.MAX_GROUP_SIZE + 1))
    assert not allows(dataclasses.replace(LLAMA_NSA, window_size=2048))
    assert not any(allows(spec) for spec in (PAPER, MAX_POOL, INFLLM))


def test_errors() -> None:
    case = Case(LEGACY, [9], num_pages=4)
    step = (case.q, case.k, case.v, case.gates, case.cache, case.lens, case.page_table, LEGACY)
    with pytest.raises(ValueError, match="softmax_scale must be positive, got 0"):
        decode_short(*step, softmax_scale=0.0)
    with pytest.raises(ValueError, match="out must be contiguous"):
        decode_short(*step, softmax_scale=0.3, out=torch.empty(1, 6, 32, device=DEVICE)[..., ::2])


def test_no_rows() -> None:
    case = Case(LEGACY, [9], num_pages=4)
    out = decode_short(
        case.q[:0], case.k[:0], case.v[:0], case.gates[:0], case.cache, case.lens, case.page_table,
        LEGACY, softmax_scale=0.3,
    )  # fmt: skip
    assert out.shape == (0, 6, 16)
