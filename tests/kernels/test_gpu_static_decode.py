"""Decode steps around static tensors, as a CUDA graph holds them.

The page table is a view of a wider one, longer than any row needs; rows with seq_len 0 are padding.
What a row does not own is poison: page ids far outside the cache, caches and inputs full of NaN.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from nsa_kernels.gpu.plan import GpuPlan, plan_decode
from nsa_kernels.ops import Branches, BranchKV, nsa_attention
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE
from tests.kernels.problem import SPECS, Problem, assert_close, make_problem

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NUM_Q_HEADS, NUM_KV_HEADS, GROUP = 6, 2, 3
POISON = 1 << 30


def make_plan(problem: Problem, rows: list[tuple[int, int] | None], num_pages: int) -> GpuPlan:
    """A decode step of (sequence, position) rows, None for padding, over `num_pages` columns."""
    table = torch.full((len(rows) + 2, num_pages + 5), POISON, dtype=torch.int32, device=DEVICE)
    swa_table = table.clone()
    seq_lens = torch.zeros(len(rows), dtype=torch.int32, device=DEVICE)
    for i, row in enumerate(rows):
        if row is not None:
            sequence, position = row
            used = position // problem.spec.block_size + 1
            table[i, :used] = torch.tensor(problem.pages[sequence][:used])
            held = problem.held_swa_pages(sequence, position)
            swa_table[i, :used] = torch.tensor(held[:used])
            seq_lens[i] = position + 1
    counters = torch.zeros(2, len(rows) * NUM_Q_HEADS, dtype=torch.int32, device=DEVICE)
    plan = plan_decode(
        seq_lens,
        (seq_lens - 1).clamp(min=0),
        table[: len(rows), :num_pages],
        counters,
        problem.spec,
        num_q_heads=NUM_Q_HEADS,
        branches=Branches(),
        swa_page_table=swa_table[: len(rows), :num_pages] if problem.separate else None,
    )
    return dataclasses.replace(plan, check_bounds=True)


def run(problem: Problem, plan: GpuPlan, rows: list[tuple[int, int] | None]) -> Tensor:
    def step(tensors: list[Tensor]) -> Tensor:
        nan = torch.full_like(tensors[0][0], torch.nan)
        return torch.stack([nan if row is None else tensors[row[0]][row[1]] for row in rows])

    names = (problem.q, problem.k, problem.v, problem.gates)
    q, k, v, gates = (step(tensors).to(DEVICE, problem.dtype) for tensors in names)
    output = nsa_attention(
        q,
        k,
        v,
        gates,
        problem.cache,
        plan,
        problem.spec,
        softmax_scale=problem.softmax_scale,
        compression=problem.mlps,
        branch_kv=(
            BranchKV(
                *(
                    step(tensors).to(DEVICE, problem.dtype)
                    for tensors in (problem.k_cmp, problem.v_cmp, problem.k_swa, problem.v_swa)
                )
            )
            if problem.separate
            else None
        ),
    )
    assert plan.counters.eq(0).all()
    return output.cpu()


def contents(problem: Problem) -> list[Tensor]:
    cache = problem.cache
    tensors = (
        cache.k, cache.v, cache.k_cmp, cache.v_cmp, cache.k_lse,
        cache.k_swa, cache.v_swa, cache.k_tail, cache.v_tail,
    )  # fmt: skip
    return [x.clone().view(torch.int32) for x in tensors if x is not None]


def make(
    spec: NSASpec, *, mlp: bool = False, separate: bool = False
) -> tuple[Problem, list[tuple[int, int] | None]]:
    """Sequences one token short of their ends, and the step that adds those between padding.

    One has no other token, one closes a window, one opens a page.
    """
    lengths = [1, 3 * spec.block_size, 6 * spec.block_size + 1]
    problem = make_problem(
        spec,
        lengths,
        heads=NUM_KV_HEADS,
        group=GROUP,
        mlp=mlp,
        separate=separate,
        path="gpu",
        device=DEVICE,
    )
    path = problem.path
    problem.path = "torch" if DEVICE.type == "cpu" else path  # not the interpreter's time
    for row, length in enumerate(lengths):
        if length > 1:
            problem.run([0], [length - 1], rows=[row])
    problem.path = path
    return problem, [None, *enumerate(length - 1 for length in lengths), None]


@pytest.mark.parametrize(
    ("name", "mlp", "separate"),
    [
        ("paper", False, False),
        ("paper", True, False),
        ("paper", False, True),
        ("paper", True, True),
        ("fla", False, True),
        ("legacy", False, False),
        ("max_pool", False, False),
        ("infllm", False, False),
    ],
)
def test_padding_and_wide_tables_change_nothing(name: str, mlp: bool, separate: bool) -> None:
    problem, rows = make(SPECS[name], mlp=mlp, separate=separate)
    before = contents(problem)
    plan = make_plan(problem, rows, 40)
    output = run(problem, plan, rows)
    assert output[[0, -1]].eq(0).all(), "padding rows are zeros"
    for i, row in enumerate(rows):
        if row is not None:
            sequence, position = row
            assert_close(output[i : i + 1], problem.expected(sequence, position, position + 1))
    # What changed belongs to the three tokens, and to the windows that one of them closes.
    counts = (3, 3, 1, 1, *((3,) * 4 if separate else (1,) * (len(before) - 4)))
    for old, new, num_written in zip(before, contents(problem), counts, strict=True):
        changed = (old != new).any(dim=3).sum(dim=(0, 2))
        assert changed.tolist() == [num_written] * NUM_KV_HEADS
    assert torch.equal(run(problem, plan, rows), output), "a repeated step differs"


def test_what_kernels_are_cut_for_is_not_what_they_compute() -> None:
    problem, rows = make(SPECS["paper"])
    plan = make_plan(problem, rows, 7)
    output = run(problem, plan, rows)
    for shape in ((5, 64), (16, 7), (64, 512)):
        other = run(problem, dataclasses.replace(plan, decode_shape=shape), rows)
        assert_close(other, output)
