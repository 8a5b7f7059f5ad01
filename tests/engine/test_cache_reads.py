"""Bytes that attention needs: closed sums against one query at a time, and against dense."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_kernels.spec import NSASpec
from nsa_serve.cache_reads import CacheReads, ReadCosts, step_reads
from nsa_serve.request import EngineRequest, Request, SamplingParams
from nsa_serve.scheduler_output import ScheduledRow, SchedulerOutput

PAPER = NSASpec()
SMALL = NSASpec(
    cmp_len=8,
    cmp_stride=4,
    block_size=8,
    num_selected_blocks=3,
    num_init_blocks=1,
    num_local_blocks=1,
    window_size=5,
)
FLA = NSASpec(
    cmp_len=16,
    cmp_stride=16,
    block_size=16,
    num_selected_blocks=4,
    num_init_blocks=1,
    num_local_blocks=2,
    window_size=0,
)
# As InfLLM-v2: dense up to a length that is no multiple of the block, and coarse windows.
INFLLM = NSASpec(
    cmp_len=8,
    cmp_stride=4,
    block_size=16,
    num_selected_blocks=5,
    num_init_blocks=1,
    num_local_blocks=2,
    window_size=0,
    score_map="max_pool",
    dense_len=131,
    lse_len=32,
    lse_stride=16,
)


def one_query(costs: ReadCosts, length: int) -> CacheReads:
    """The definition, for one query at a sequence length."""
    spec = costs.spec
    entry_bytes = costs.key_bytes + costs.value_bytes
    num_blocks = -(-length // spec.block_size)
    is_dense = num_blocks <= spec.num_selected_blocks or length < spec.dense_len
    num_selected = num_blocks if is_dense else spec.num_selected_blocks
    own_block_tokens = length - (num_blocks - 1) * spec.block_size
    slc_tokens = (num_selected - 1) * spec.block_size + own_block_tokens
    selects = costs.uses_slc and not is_dense
    cmp_bytes = 0
    if costs.uses_cmp:
        cmp_bytes = spec.num_windows(length) * entry_bytes
    elif selects:
        cmp_bytes = spec.num_windows(length) * costs.key_bytes
    if selects and spec.lse_len:
        ends = range(spec.lse_len, length + 1, spec.lse_stride)
        cmp_bytes += len(ends) * costs.key_bytes
    return CacheReads(
        cmp_bytes=cmp_bytes,
        slc_bytes=slc_tokens * entry_bytes if costs.uses_slc else 0,
        swa_bytes=min(length, spec.window_size) * entry_bytes if costs.uses_swa else 0,
        dense_bytes=length * entry_bytes,
        num_selected_blocks=num_selected if costs.uses_slc else 0,
        num_visible_blocks=num_blocks if costs.uses_slc else 0,
    )


@settings(max_examples=150, deadline=None)
@given(
    spec=st.sampled_from([PAPER, SMALL, FLA, INFLLM]),
    branches=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    start=st.integers(0, 1500),
    num_queries=st.integers(1, 200),
)
def test_a_chunk_is_the_sum_of_its_queries(
    spec: NSASpec, branches: tuple[bool, bool, bool], start: int, num_queries: int
) -> None:
    cmp, slc, swa = branches
    costs = ReadCosts(
        spec=spec, key_bytes=6, value_bytes=4, uses_cmp=cmp, uses_slc=slc, uses_swa=swa
    )
    expected = CacheReads()
    for length in range(start + 1, start + num_queries + 1):
        expected += one_query(costs, length)
    assert costs.of_queries(start, num_queries) == expected
    assert costs.of_rows(range(start + 1, start + num_queries + 1)) == expected


def test_a_decode_row_of_the_paper_at_64k() -> None:
    # 2 KV heads, 192 + 128 dims, bfloat16, one layer.
    costs = ReadCosts(spec=PAPER, key_bytes=2 * 192 * 2, value_bytes=2 * 128 * 2)
    reads = costs.of_queries(65535, 1)
    assert reads.dense_bytes == 65536 * 1280
    assert reads.slc_bytes == 16 * 64 * 1280
    assert reads.swa_bytes == 512 * 1280
    assert reads.cmp_bytes == 4095 * 1280
    assert (reads.num_selected_blocks, reads.num_visible_blocks) == (16, 1024)


@pytest.mark.parametrize("length", [1, 7, 8, 24])
def test_up_to_the_selected_blocks_slc_is_dense(length: int) -> None:
    costs = ReadCosts(spec=SMALL, key_bytes=1, value_bytes=1, uses_cmp=False, uses_swa=False)
    reads = costs.of_queries(length - 1, 1)
    assert reads.slc_bytes == reads.dense_bytes == 2 * length
    assert reads.cmp_bytes == 0


def test_decode_rows_are_counted_apart_from_chunks() -> None:
    request = Request(
        EngineRequest(request_id="a", prompt_token_ids=[0] * 50, params=SamplingParams())
    )
    costs = ReadCosts(spec=SMALL, key_bytes=3, value_bytes=5)
    decode = ScheduledRow(request, 40, 1, samples=True)
    chunk = ScheduledRow(request, 8, 17, samples=False)
    rows = [decode, decode, chunk]
    decode_reads, prefill_reads = step_reads(SchedulerOutput(rows, 19, 2, []), costs)
    assert decode_reads == costs.of_queries(40, 1) + costs.of_queries(40, 1)
    assert prefill_reads == costs.of_queries(8, 17)
