"""The paged operators against the fp32 specification, over ugly sizes and every dialect."""

import itertools
from dataclasses import replace

import pytest
import torch

from nsa_kernels.metadata import build_metadata
from nsa_kernels.ops import Branches
from nsa_kernels.spec import NSASpec
from tests.kernels.problem import FLA, PAPER, SPECS, assert_close, make_problem


@pytest.mark.parametrize("name", SPECS)
def test_whole_prefill_of_ragged_rows(name: str) -> None:
    spec = SPECS[name]
    lengths = [1, spec.cmp_len - 1, spec.cmp_len, spec.block_size + 1, 63, 111, 333]
    problem = make_problem(spec, lengths)
    outputs = problem.run([0] * len(lengths), lengths)
    for row, length in enumerate(lengths):
        assert_close(outputs[row], problem.expected(row, 0, length))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("chunk", [7, 64, 100])
def test_chunks_equal_the_whole(name: str, chunk: int) -> None:
    problem = make_problem(SPECS[name], [259])
    parts = []
    for start in range(0, 259, chunk):
        parts += problem.run([start], [min(chunk, 259 - start)])
    assert_close(torch.cat(parts), problem.expected(0, 0, 259))


@pytest.mark.parametrize("name", SPECS)
def test_decode_continues_a_prefill_across_every_boundary(name: str) -> None:
    spec = SPECS[name]
    prompt, steps = 3 * spec.block_size - 2, 2 * spec.block_size + 5
    problem = make_problem(spec, [prompt + steps])
    problem.run([0], [prompt])
    outputs = [problem.run([prompt + i], [1], num_decode_rows=1)[0] for i in range(steps)]
    assert_close(torch.cat(outputs), problem.expected(0, prompt, prompt + steps))


@pytest.mark.parametrize("name", SPECS)
def test_decode_rows_and_chunks_share_a_step(name: str) -> None:
    spec = SPECS[name]
    lengths = [5, 40, 300, 301, 150]
    starts = [4, 39, 299, 0, 130]
    problem = make_problem(spec, lengths)
    for row, start in enumerate(starts):
        if start:
            problem.run([0], [start], rows=[row])
    query_lens = [length - start for length, start in zip(lengths, starts, strict=True)]
    outputs = problem.run(starts, query_lens, num_decode_rows=3)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert_close(outputs[row], problem.expected(row, start, length))


@pytest.mark.parametrize("group", [1, 3, 8, 16])
@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (60, 60), (192, 128)])
def test_group_sizes_and_head_dims(group: int, dim: int, v_dim: int) -> None:
    problem = make_problem(PAPER, [401], group=group, dim=dim, v_dim=v_dim, seed=group)
    problem.run([0], [400])
    assert_close(problem.run([400], [1], num_decode_rows=1)[0], problem.expected(0, 400, 401))
    problem = make_problem(PAPER, [401], group=group, dim=dim, v_dim=v_dim, seed=group)
    assert_close(problem.run([0], [401])[0], problem.expected(0, 0, 401))


@pytest.mark.parametrize("name", ["paper", "fla", "odd"])
def test_learned_compression(name: str) -> None:
    problem = make_problem(SPECS[name], [230], mlp=True)
    problem.run([0], [129])
    outputs = problem.run([129], [100])
    assert_close(outputs[0], problem.expected(0, 129, 229))
    assert_close(problem.run([229], [1], num_decode_rows=1)[0], problem.expected(0, 229, 230))


@pytest.mark.parametrize("name", ["paper", "fla", "odd"])
@pytest.mark.parametrize("mlp", [False, True])
def test_branches_with_keys_of_their_own(name: str, mlp: bool) -> None:
    spec = SPECS[name]
    problem = make_problem(spec, [230, 57], mlp=mlp, separate=True)
    problem.run([0, 0], [129, 30])
    outputs = problem.run([30, 129], [20, 99], rows=[1, 0])
    assert_close(outputs[0], problem.expected(1, 30, 50))
    assert_close(outputs[1], problem.expected(0, 129, 228))
    for step in range(2):
        outputs = problem.run([50 + step, 228 + step], [1, 1], rows=[1, 0], num_decode_rows=2)
        assert_close(outputs[0], problem.expected(1, 50 + step, 51 + step))
        assert_close(outputs[1], problem.expected(0, 228 + step, 229 + step))


def test_gate_logits_pass_through_the_sigmoid() -> None:
    problem = make_problem(PAPER, [90])
    assert_close(problem.run([0], [90], gate_logits=True)[0], problem.expected(0, 0, 90))


def test_branch_keys_without_a_cache_for_them_are_refused() -> None:
    problem = make_problem(FLA, [20], separate=True)
    problem.cache = replace(problem.cache, k_tail=None)
    with pytest.raises(ValueError, match="branch_kv given and a cache with 3 of the four"):
        problem.run([0], [20])
    with pytest.raises(ValueError, match="row 0 has 20 tokens but 1 pages of 16"):
        build_metadata([[1, 2]], [0], [20], FLA, swa_pages=[[1]])


CONSTANT_GATES = [g for g in itertools.product((0.0, 1.0, 0.5), repeat=3) if any(g)][::4]


@pytest.mark.parametrize("gates", CONSTANT_GATES)
def test_constant_gates_skip_unused_branches(gates: tuple[float, float, float]) -> None:
    problem = make_problem(PAPER, [330, 41])
    branches = Branches(*(gate != 0.0 for gate in gates))
    full = torch.tensor(gates).expand(330, 6, 3)
    outputs = problem.run([0, 0], [329, 41], branches=branches, gates=gates)
    assert_close(outputs[0], problem.expected(0, 0, 329, full[:329]))
    assert_close(outputs[1], problem.expected(1, 0, 41, full[:41]))
    last = problem.run([329], [1], rows=[0], num_decode_rows=1, branches=branches, gates=gates)
    assert_close(last[0], problem.expected(0, 329, 330, full[:1]))


@pytest.mark.parametrize("name", SPECS)
def test_equal_scores_choose_the_lower_block(name: str) -> None:
    """Zero keys and 2^k windows: all probabilities are the same power of two, so ties are exact.

    The values differ, so a query that chose other blocks among the tied has another output.
    """
    spec = SPECS[name]
    length = 63 * spec.cmp_stride + spec.cmp_len
    assert spec.num_windows(length) == 64
    problem = make_problem(spec, [length])
    problem.k[0].zero_()
    expected = problem.expected(0, length - 1, length)
    problem.run([0], [length - 1])
    assert_close(problem.run([length - 1], [1], num_decode_rows=1)[0], expected)
    problem.run([0], [length // 2])
    assert_close(problem.run([length // 2], [length - length // 2])[0][-1:], expected)


def test_bfloat16_stays_near_the_specification() -> None:
    # bf16 rounds scores and probabilities to 8 bits: 1e-2 on the whole is what that costs. The
    # selection is kept out of it by making all blocks selected.
    spec = NSASpec(num_selected_blocks=16, window_size=96)
    problem = make_problem(spec, [500], dim=64, v_dim=64, dtype=torch.bfloat16)
    problem.run([0], [499])
    last = problem.run([499], [1], num_decode_rows=1)[0]
    assert_close(last, problem.expected(0, 499, 500), tolerance=1e-2)


def test_nothing_but_own_pages_is_read_or_written() -> None:
    problem = make_problem(PAPER, [300, 300])
    problem.run([0], [300], rows=[0])
    owned = set(problem.pages[0])
    for tensor in (problem.cache.k, problem.cache.v, problem.cache.k_cmp, problem.cache.v_cmp):
        for page in range(1, tensor.shape[0]):
            if page not in owned:
                assert tensor[page].isnan().all(), f"page {page} was written"


def test_wrong_shapes_name_the_tensor() -> None:
    problem = make_problem(FLA, [20])
    problem.v[0] = problem.v[0][..., :8]
    with pytest.raises(ValueError, match=r"v must have shape \(20, 2, 16\), got \(20, 2, 8\)"):
        problem.run([0], [20])
    with pytest.raises(ValueError, match="row 0 has 40 tokens but 2 pages of 16"):
        build_metadata([[1, 2]], [0], [40], FLA)
