"""InfLLM-v2 on the serving paths: dense below `dense_len`, coarse windows, lists of two lengths.

Both paths against the fp32 specification; the kernels in the interpreter where there is no GPU.
Caches start out as NaN, so whatever is read was written before.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa_kernels import reference
from nsa_kernels.gpu import plan as gpu_plan
from nsa_kernels.gpu.common import check_geometry
from nsa_kernels.gpu.lse import decode_lse
from nsa_kernels.metadata import build_metadata
from nsa_kernels.ops import BlockTrace, Branches, nsa_attention, plan_attention
from nsa_kernels.spec import NSASpec
from tests.kernels.gpu_util import DEVICE
from tests.kernels.problem import INFLLM, Problem, assert_close, make_problem

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SLC_ONLY = (0.0, 1.0, 0.0)
ONLY = Branches(cmp=False, swa=False)
PATHS = pytest.mark.parametrize("path", ["torch", "gpu"])


@pytest.fixture(autouse=True)
def prefill_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend block by block, as over long contexts, unless a test asks for "short"."""
    if getattr(request, "param", "long") == "long":
        monkeypatch.setattr(gpu_plan, "short_context", lambda spec: 0)


def make(spec: NSASpec, lengths: list[int], path: str, **arguments: Any) -> Problem:
    arguments = {"heads": 1, "group": 2} | arguments
    device = DEVICE if path == "gpu" else None
    return make_problem(spec, lengths, path=path, device=device, **arguments)


def fill(problem: Problem, row: int, stop: int) -> None:
    """Bring a row's first tokens into the cache: not by the interpreter, whose time they are."""
    path = problem.path
    problem.path = "torch" if DEVICE.type == "cpu" else path
    if stop:
        problem.run([0], [stop], rows=[row], branches=ONLY, gates=SLC_ONLY)
    problem.path = path


def expected(problem: Problem, row: int, start: int, stop: int) -> torch.Tensor:
    gates = torch.tensor(SLC_ONLY).expand(stop - start, problem.q[row].shape[1], 3)
    return problem.expected(row, start, stop, gates)


# Context of a decode row with its token, around every edge: windows close at 32 and 64 (coarse: 128
# and 192), pages end at multiples of 64, blocks are chosen from 257 and attended sparsely from 300.
EDGES = (32, 64, 128, 192, 256, 300, 320, 384, 448)


@PATHS
@pytest.mark.parametrize("group", [1, 8, 16])
def test_decode_rows_on_both_sides_of_every_edge(path: str, group: int) -> None:
    lengths = [1] + [edge + i for edge in EDGES for i in (-1, 0, 1)]
    problem = make(INFLLM, lengths, path, group=group, seed=group)
    starts = [length - 1 for length in lengths]
    for row, start in enumerate(starts):
        fill(problem, row, start)
    rows = len(lengths)
    outputs = problem.run(starts, [1] * rows, num_decode_rows=rows, branches=ONLY, gates=SLC_ONLY)
    for row, start in enumerate(starts):
        assert_close(outputs[row], expected(problem, row, start, start + 1))


@PATHS
@pytest.mark.parametrize("dense_len", [0, 1, 200, 257, 321, 330, 1000])
def test_wherever_dense_attention_ends(path: str, dense_len: int) -> None:
    spec = replace(INFLLM, dense_len=dense_len)
    lengths = [200, 256, 257, 320, 321, 329, 330, 331, 400]
    problem = make(spec, lengths, path, group=3)
    for row, length in enumerate(lengths):
        fill(problem, row, length - 1)
    starts, rows = [length - 1 for length in lengths], len(lengths)
    outputs = problem.run(starts, [1] * rows, num_decode_rows=rows, branches=ONLY, gates=SLC_ONLY)
    for row, start in enumerate(starts):
        assert_close(outputs[row], expected(problem, row, start, start + 1))


@PATHS
@pytest.mark.parametrize("prefill_path", ["long", "short"], indirect=True)
@pytest.mark.parametrize("cuts", [(), (299,), (127, 128, 298, 300), (31, 65, 191, 320)])
def test_chunks_equal_the_whole(path: str, cuts: tuple[int, ...]) -> None:
    problem = make(INFLLM, [390], path)
    edges = [0, *cuts, 390]
    parts = []
    for start, stop in itertools.pairwise(edges):
        parts += problem.run([start], [stop - start], branches=ONLY, gates=SLC_ONLY)
    assert_close(torch.cat(parts), expected(problem, 0, 0, 390))


@PATHS
def test_decode_equals_prefill_across_the_edges(path: str) -> None:
    """One token after the other, over the end of a coarse window, a page and dense attention."""
    problem = make(INFLLM, [325], path)
    fill(problem, 0, 294)
    outputs = [
        problem.run([t], [1], num_decode_rows=1, branches=ONLY, gates=SLC_ONLY)[0]
        for t in range(294, 325)
    ]
    assert_close(torch.cat(outputs), expected(problem, 0, 294, 325))


@PATHS
def test_a_step_of_decode_rows_and_chunks(path: str) -> None:
    """Rows that are dense, that choose, and a chunk that goes from one to the other."""
    lengths, starts = [130, 299, 384, 120, 335], [129, 298, 383, 0, 270]
    problem = make(INFLLM, lengths, path)
    for row, start in enumerate(starts):
        fill(problem, row, start)
    counts = [length - start for length, start in zip(lengths, starts, strict=True)]
    outputs = problem.run(starts, counts, num_decode_rows=3, branches=ONLY, gates=SLC_ONLY)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert_close(outputs[row], expected(problem, row, start, length))


@PATHS
@pytest.mark.parametrize(("lse_len", "lse_stride"), [(32, 32), (64, 16), (192, 64), (256, 32)])
def test_other_coarse_windows(path: str, lse_len: int, lse_stride: int) -> None:
    spec = replace(INFLLM, lse_len=lse_len, lse_stride=lse_stride, dense_len=0)
    problem = make(spec, [385, 384], path)
    problem.run([0], [383], rows=[1], branches=ONLY, gates=SLC_ONLY)
    fill(problem, 0, 320)
    outputs = problem.run([383, 320], [1, 65], rows=[1, 0], num_decode_rows=1)
    assert_close(outputs[0], problem.expected(1, 383, 384))
    assert_close(outputs[1], problem.expected(0, 320, 385))


@PATHS
def test_a_window_and_dense_queries_share_keys(path: str) -> None:
    """Local blocks inside the window feed both softmaxes, also of a row that lists all blocks."""
    spec = replace(INFLLM, window_size=250, dense_len=400)
    lengths = [257, 399, 400]
    problem = make(spec, lengths, path)
    for row, length in enumerate(lengths):
        fill(problem, row, length - 1)
    starts = [length - 1 for length in lengths]
    outputs = problem.run(starts, [1] * 3, num_decode_rows=3)
    for row, start in enumerate(starts):
        assert_close(outputs[row], problem.expected(row, start, start + 1))


@PATHS
def test_a_window_over_everything_is_dense_attention(path: str) -> None:
    """How a model that is dense at any length is spelled: no list of blocks, no other branch."""
    spec = NSASpec(window_size=1 << 16)
    problem = make(spec, [1, 700, 333], path)
    branches, gates = Branches(cmp=False, slc=False), (0.0, 0.0, 1.0)
    problem.run([0], [699], rows=[1], branches=branches, gates=gates)
    outputs = problem.run(
        [0, 699, 0], [1, 1, 333], num_decode_rows=2, branches=branches, gates=gates
    )
    for row, (start, stop) in enumerate(((0, 1), (699, 700), (0, 333))):
        q, k, v = problem.q[row][start:stop], problem.k[row], problem.v[row]
        scores = torch.einsum("qgd,td->gqt", q, k[:, 0]) * problem.softmax_scale
        causal = torch.arange(stop) <= torch.arange(start, stop)[:, None]
        weights = torch.softmax(scores.masked_fill(~causal, -torch.inf), dim=-1)
        assert_close(outputs[row], torch.einsum("gqt,td->qgd", weights, v[:, 0]))


@pytest.mark.parametrize(("lse_len", "lse_stride"), [(128, 64), (64, 32), (256, 16)])
def test_coarse_keys_and_their_log_sum_exp(lse_len: int, lse_stride: int) -> None:
    """Filed by chunks and by decode rows; of no other entry is anything read."""
    spec = replace(INFLLM, lse_len=lse_len, lse_stride=lse_stride, dense_len=0)
    lengths = [257, 320, 384, 447, 448]
    problem = make(spec, lengths, "gpu", heads=2, group=3)
    for row, length in enumerate(lengths):
        fill(problem, row, length - 1)
    table = torch.zeros(len(lengths), 9, dtype=torch.int32)
    for row, pages in enumerate(problem.pages):
        table[row, : len(pages)] = torch.tensor(pages)
    q, k = (torch.stack([x[-1] for x in xs]).to(DEVICE) for xs in (problem.q, problem.k))
    part = decode_lse(
        q,
        k,
        problem.cache,
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        table.to(DEVICE),
        spec,
        softmax_scale=problem.softmax_scale,
        num_sms=132,
        check=True,
    )
    actual = torch.logsumexp(part.cpu() * math.log(2), dim=-1)
    assert problem.cache.k_lse is not None
    for row, length in enumerate(lengths):
        k_lse = reference.compress_mean(problem.k[row], spec.coarse)
        stored = reference.gather_cmp(
            problem.cache.k_lse.cpu(), torch.tensor(problem.pages[row]), length, spec.coarse
        )
        assert_close(stored, k_lse)
        position = torch.tensor([length - 1])
        lse = reference.selection_lse(
            problem.q[row][-1:], k_lse, position, spec, softmax_scale=problem.softmax_scale
        )
        assert_close(actual[row : row + 1], lse)


@pytest.mark.parametrize("cuts", [(), (127, 128, 191), (64, 129)])
def test_chunks_file_coarse_keys(cuts: tuple[int, ...]) -> None:
    problem = make(INFLLM, [260], "gpu", heads=2)
    for start, stop in itertools.pairwise([0, *cuts, 260]):
        problem.run([start], [stop - start], branches=ONLY, gates=SLC_ONLY)
    assert problem.cache.k_lse is not None
    pages = torch.tensor(problem.pages[0])
    stored = reference.gather_cmp(problem.cache.k_lse.cpu(), pages, 260, INFLLM.coarse)
    assert_close(stored, reference.compress_mean(problem.k[0], INFLLM.coarse))


@PATHS
def test_the_selection_is_that_of_coarse_windows(path: str) -> None:
    """With the log-sum-exp of the fine windows, some query would choose other blocks."""
    problem = make(INFLLM, [448], path, group=4, seed=5)
    fill(problem, 0, 400)
    output = problem.run([400], [48], branches=ONLY, gates=SLC_ONLY)[0]
    problem.spec = replace(INFLLM, lse_len=0, lse_stride=0)
    other = expected(problem, 0, 400, 448)
    assert (output - other).norm() / other.norm() > 0.01


def test_a_trace_lists_what_dense_queries_see() -> None:
    problem = make(INFLLM, [298, 384, 330], "torch")
    for row, stop in enumerate((297, 383, 290)):
        fill(problem, row, stop)
    meta = build_metadata(problem.pages, [297, 383, 290], [1, 1, 40], INFLLM, num_decode_rows=2)
    trace = BlockTrace([0, 1, 2, 41])
    plan = plan_attention(
        meta, INFLLM, num_q_heads=2, num_kv_heads=1, dtype=torch.float32, branches=ONLY, trace=trace
    )

    def step(x: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([x[0][297:], x[1][383:], x[2][290:]])

    nsa_attention(
        step(problem.q), step(problem.k), step(problem.v), SLC_ONLY, problem.cache, plan, INFLLM,
        softmax_scale=0.25,
    )  # fmt: skip
    dense, sparse, first, last = (trace.blocks_of(i, [0])[0][0] for i in range(4))
    assert dense == first == [0, 1, 2, 3, 4]
    assert len(sparse) == len(last) == 4
    assert {0, 4, 5} < set(sparse) and {0, 4, 5} < set(last)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lse_stride": 4, "lse_len": 128}, "at most 16"),
        ({"dense_len": 1024 * 64 + 2}, "1025 .*window"),
    ],
)  # fmt: skip
def test_what_the_kernels_cannot_do_is_refused(fields: dict[str, int], message: str) -> None:
    spec = replace(INFLLM, **fields)
    with pytest.raises(ValueError, match=message):
        check_geometry(spec)


def test_a_cache_without_coarse_keys_is_refused() -> None:
    problem = make(INFLLM, [10], "torch")
    problem.cache = replace(problem.cache, k_lse=None)
    with pytest.raises(ValueError, match=r"k_lse exactly where.*lse_len 128 and a cache without"):
        problem.run([0], [10])


def test_coarse_windows_need_shared_keys() -> None:
    with pytest.raises(ValueError, match="lse_len needs keys that the branches share"):
        build_metadata([[1]], [0], [5], INFLLM, swa_pages=[[1]])
