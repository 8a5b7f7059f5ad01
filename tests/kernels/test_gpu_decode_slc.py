"""Decode's selected and window attention with the gates, against the fp32 specification."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.gpu.decode_slc import decode_slc, default_config
from nsa_kernels.metadata import LayerCache
from nsa_kernels.spec import NSASpec
from nsa_kernels.torch_plan import Branches
from tests.kernels.gpu_util import DEVICE
from tests.kernels.problem import assert_close

# Relative to the norm of the output: 16-bit kernels round probabilities and outputs, both to 8
# (bf16) or 11 (fp16) bits; fp32 differs from the specification in summation order.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}

SMALL = NSASpec(
    cmp_len=16, cmp_stride=16, block_size=16, num_selected_blocks=4, window_size=24
)  # fmt: skip
PAPER = NSASpec()


@dataclass
class Case:
    """One decode step: the operands of the kernel, and what it should return."""

    spec: NSASpec
    q: Tensor
    gates: Tensor
    cache: LayerCache
    seq_lens: Tensor
    page_table: Tensor
    swa_page_table: Tensor | None
    block_indices: Tensor
    block_pages: Tensor
    o_part: Tensor
    lse2_part: Tensor
    counters: Tensor
    outputs: list[Tensor]  # fp32 [Nd, HQ, Dv] on the CPU: cmp, slc, swa

    def run(
        self,
        branches: Branches | None = None,
        gates: Tensor | tuple[float, float, float] | None = None,
        sigmoid_gates: bool = False,
        check: bool = True,
        **config: int,
    ) -> Tensor:
        """Run the kernel into a poisoned output, and look at the counters."""
        branches = branches or Branches()
        num_q_heads, num_kv_heads = self.q.shape[1], self.cache.k.shape[1]
        chosen = default_config(
            len(self.q),
            num_q_heads,
            num_kv_heads,
            self.q.shape[2],
            self.cache.v.shape[3],
            self.o_part.shape[2],
            self.q.dtype,
            self.spec,
            132,
        )
        shape = (*self.q.shape[:2], self.cache.v.shape[3])
        out = torch.full(shape, torch.nan, dtype=self.q.dtype, device=DEVICE)
        result = decode_slc(
            self.q,
            self.gates if gates is None else gates,
            self.cache,
            self.seq_lens,
            self.page_table,
            self.spec,
            softmax_scale=self.q.shape[2] ** -0.5,
            counters=self.counters,
            num_sms=132,
            branches=branches,
            block_indices=self.block_indices if branches.slc else None,
            block_pages=self.block_pages if branches.slc else None,
            o_part=self.o_part if branches.cmp else None,
            lse2_part=self.lse2_part if branches.cmp else None,
            swa_page_table=self.swa_page_table,
            sigmoid_gates=sigmoid_gates,
            out=out,
            config=replace(chosen, **config),
            check=check,
        )
        assert result is out
        assert not self.counters.any()
        return out

    def expected(self, branches: Branches | None = None, gates: Tensor | None = None) -> Tensor:
        """The specification's output; zeros for a padding row."""
        branches = branches or Branches()
        on = (branches.cmp, branches.slc, branches.swa)
        gates = (self.gates.float().cpu() if gates is None else gates) * torch.tensor(on)
        return reference.combine(*self.outputs, gates)


def make_case(
    lengths: list[int],
    spec: NSASpec = SMALL,
    *,
    heads: int = 2,
    group: int = 3,
    dim: int = 16,
    v_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    cmp_splits: int = 3,
    separate: bool = False,
    seed: int = 0,
) -> Case:
    """Random rows; what the kernel must not read is NaN, length 0 is a padding row.

    Selected blocks are in random order with -1 in between, the local ones among them.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    size, num_rows, num_q_heads = spec.block_size, len(lengths), heads * group
    counts = [-(-length // size) for length in lengths]
    num_pages = sum(counts) + 1
    shuffled = (torch.randperm(num_pages - 1, generator=generator) + 1).to(torch.int32)
    # Page 0 is NaN as well: nothing may read it.
    caches = [
        torch.full((num_pages, heads, size, width), torch.nan, dtype=dtype)
        for width in ((dim, v_dim, dim, v_dim) if separate else (dim, v_dim))
    ]
    page_table = torch.zeros(num_rows, max(counts), dtype=torch.int32)
    swa_page_table = torch.zeros_like(page_table)
    blocks = torch.full((num_rows, heads, spec.num_selected_blocks), -1, dtype=torch.int32)
    pages = torch.full_like(blocks, -1)
    q = randn(num_rows, num_q_heads, dim) * 2
    outputs = [torch.zeros(num_rows, num_q_heads, v_dim) for _ in range(3)]
    used = 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        if not length:
            continue
        page_table[row, :count] = shuffled[used : used + count]
        first_window = max(length - spec.window_size, 0) // size
        swa_page_table[row, first_window:count] = page_table[row, first_window:count]
        used += count
        for head in range(heads):
            # Local blocks, or all that there are, and a random choice of the others.
            chosen = torch.arange(count)
            if count > spec.num_selected_blocks:
                num_free = spec.num_selected_blocks - spec.num_local_blocks - (row + head) % 2
                others = torch.randperm(count - spec.num_local_blocks, generator=generator)
                chosen = torch.cat((others[:num_free], chosen[-spec.num_local_blocks :]))
            num_chosen = len(chosen)
            places = torch.randperm(spec.num_selected_blocks, generator=generator)[:num_chosen]
            blocks[row, head, places] = chosen.int()
            pages[row, head, places] = page_table[row, chosen]
        kv = [randn(length, heads, cache.shape[3]) for cache in caches]
        window = set(range(first_window, count))
        for index, (cache, x) in enumerate(zip(caches, kv, strict=True)):
            for head in range(heads):
                selected = set(blocks[row, head].tolist()) - {-1}
                readable = selected | window if not separate else (selected, window)[index // 2]
                for block in readable:
                    tokens = x[block * size : (block + 1) * size, head]
                    cache[page_table[row, block], head, : len(tokens)] = tokens
        args = (torch.tensor([length - 1]), spec)
        scale = dim**-0.5
        one = q[row : row + 1]
        outputs[1][row] = reference.slc_attention(
            one, *kv[:2], blocks[row : row + 1], *args, softmax_scale=scale
        )[0]
        outputs[2][row] = reference.swa_attention(one, *kv[-2:], *args, softmax_scale=scale)[0]
    # Partial outputs of the compression branch: any values; the first share of odd heads is empty.
    o_part = torch.randn(num_rows, num_q_heads, cmp_splits, v_dim, generator=generator)
    lse2 = torch.randn(num_rows, num_q_heads, cmp_splits, generator=generator) * 4
    lse2[:, 1::2, 0] = -torch.inf
    weights = torch.softmax(lse2 * 0.6931471805599453, dim=-1).nan_to_num()
    outputs[0] = (weights[..., None] * o_part).sum(dim=2)
    o_part[lse2 == -torch.inf] = torch.nan
    padding = torch.tensor(lengths) == 0
    outputs[0][padding] = 0
    o_part[padding], lse2[padding] = torch.nan, torch.nan

    # Queries and gates are slices of one projection, as a model has them.
    fused = torch.full((num_rows, num_q_heads, dim + 8), torch.nan, dtype=dtype, device=DEVICE)
    fused[..., :dim] = q.to(DEVICE)
    gates = torch.full((num_rows, num_q_heads * 3 + 5), torch.nan, dtype=dtype, device=DEVICE)
    gates[:, : num_q_heads * 3] = torch.rand(
        num_rows, num_q_heads * 3, generator=generator, dtype=torch.float32
    )
    device_caches = [cache.to(DEVICE) for cache in caches]
    no_cmp = torch.empty(0, device=DEVICE)
    return Case(
        spec=spec,
        q=fused[..., :dim],
        gates=gates[:, : num_q_heads * 3].view(num_rows, num_q_heads, 3),
        cache=LayerCache(*device_caches[:2], no_cmp, no_cmp, *device_caches[2:]),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        page_table=page_table.to(DEVICE),
        swa_page_table=swa_page_table.to(DEVICE) if separate else None,
        block_indices=blocks.to(DEVICE),
        block_pages=pages.to(DEVICE),
        o_part=o_part.to(DEVICE),
        lse2_part=lse2.to(DEVICE),
        counters=torch.zeros(num_rows * num_q_heads, dtype=torch.int32, device=DEVICE),
        outputs=outputs,
    )


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(case: Case, branches: Branches | None = None, **config: int) -> None:
    """Compare one run with the specification."""
    tolerance = TOLERANCES[case.q.dtype]
    actual = case.run(branches, **config).cpu()
    assert_close(actual, case.expected(branches), tolerance)
    assert not actual[(case.seq_lens == 0).cpu()].any()


def test_ragged_rows_and_padding() -> None:
    check(make_case([1, 0, 16, 17, 150, 0]))


@pytest.mark.parametrize("length", [23, 24, 25, 31, 32, 33, 40, 41])
def test_every_alignment_of_the_window(length: int) -> None:
    check(make_case([length], heads=1))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("num_local", [1, 2])
def test_window_with_and_without_its_own_pages(separate: bool, num_local: int) -> None:
    spec = replace(SMALL, num_local_blocks=num_local)
    check(make_case([5, 90, 143], spec, separate=separate, seed=3))


def test_local_blocks_that_reach_out_of_the_window() -> None:
    spec = replace(SMALL, num_selected_blocks=6, num_local_blocks=4, window_size=9)
    check(make_case([5, 90, 143], spec, seed=3))


@pytest.mark.parametrize("group", [1, 6, 16])
@pytest.mark.parametrize(("dim", "v_dim"), [(60, 60), (192, 128)])
def test_group_sizes_and_head_dims(group: int, dim: int, v_dim: int) -> None:
    check(make_case([77], group=group, dim=dim, v_dim=v_dim, heads=1, seed=group))


@pytest.mark.parametrize("size", [8, 32, 64, 128])
@pytest.mark.parametrize("block_n", [16, 64])
def test_block_sizes_and_tiles(size: int, block_n: int) -> None:
    spec = NSASpec(
        cmp_len=8, cmp_stride=8, block_size=size, num_selected_blocks=3, window_size=size + 5
    )
    check(make_case([3 * size - 1, 7 * size + 3], spec, heads=1), block_n=block_n)


def test_shares_that_begin_inside_a_page() -> None:
    spec = NSASpec(cmp_len=8, cmp_stride=8, block_size=128, num_selected_blocks=3, window_size=300)
    check(make_case([900], spec, heads=1), block_n=32, slc_splits=4, swa_splits=5)


@pytest.mark.parametrize(
    "config",
    [
        {"slc_splits": 1, "swa_splits": 1, "cmp_programs": 0},
        {"slc_splits": 3, "swa_splits": 3, "cmp_programs": 2, "block_n": 16},
        {"slc_splits": 16, "swa_splits": 16, "cmp_programs": 16, "head_tile": 2, "block_n": 16},
        {"head_tile": 1},
    ],
)
def test_any_cut_gives_the_same(config: dict[str, int]) -> None:
    check(make_case([0, 143], group=5, heads=1, cmp_splits=5), **config)


def test_many_compression_splits() -> None:
    check(make_case([40], group=4, cmp_splits=37))


@pytest.mark.parametrize("cmp", [False, True])
@pytest.mark.parametrize("slc", [False, True])
@pytest.mark.parametrize("swa", [False, True])
def test_branches_can_be_off(cmp: bool, slc: bool, swa: bool) -> None:
    check(make_case([0, 70], heads=1), Branches(cmp=cmp, slc=slc, swa=swa))


def test_no_window() -> None:
    case = make_case([0, 100], replace(SMALL, window_size=0))
    check(case)
    check(case, Branches(cmp=False, slc=False))


def test_constant_gates_and_logits() -> None:
    case = make_case([70])
    constants = (0.5, 2.0, -1.0)
    expected = case.expected(gates=torch.tensor(constants).expand(case.gates.shape))
    assert_close(case.run(gates=constants).cpu(), expected, 1e-5)
    expected = case.expected(gates=case.gates.cpu().sigmoid())
    assert_close(case.run(sigmoid_gates=True).cpu(), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    check(make_case([143], dtype=dtype, heads=1))


def test_errors_say_what_is_missing() -> None:
    case = make_case([20])
    case.counters = case.counters[:1]
    with pytest.raises(ValueError, match="counters must hold 2 values, got 1"):
        case.run()
    case = make_case([20], separate=True)
    case.swa_page_table = None
    with pytest.raises(ValueError, match="swa_page_table is needed"):
        case.run()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("group", "dim", "v_dim"),
    [(16, 128, 128), (16, 192, 128), (64, 128, 128), (128, 64, 64), (8, 96, 80), (1, 256, 256)],
)
def test_full_size(group: int, dim: int, v_dim: int, dtype: torch.dtype) -> None:
    case = make_case(
        [1, 0, 700, 2048, 5000, 8191],
        PAPER,
        group=group,
        dim=dim,
        v_dim=v_dim,
        dtype=dtype,
        cmp_splits=32,
    )
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_full_size_block_sizes(size: int, separate: bool) -> None:
    spec = NSASpec(
        cmp_len=16, cmp_stride=16, block_size=size, num_selected_blocks=16, window_size=500
    )
    lengths = [0, 90 * size // 2, 3000, 17, 4096]
    case = make_case(
        lengths, spec, group=16, dim=128, v_dim=128, dtype=torch.bfloat16, separate=separate
    )
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 40])
def test_many_runs_agree(num_rows: int) -> None:
    case = make_case(
        [1500 + 37 * row for row in range(num_rows)],
        PAPER,
        heads=4,
        group=16,
        dim=128,
        v_dim=128,
        dtype=torch.bfloat16,
        cmp_splits=16,
    )
    check(case)
    first = case.run(check=False)
    # Whoever arrives last adds the shares in the same order.
    assert all(torch.equal(case.run(check=False), first) for _ in range(50))
