"""The whole NSA operator on a GPU: decode rows in three kernels, prefill chunks in sub-chunks.

T tokens of the step, Nd of them decode rows in front, HQ query heads, H KV heads, D and Dv
dimensions of keys and of values, S selected blocks.
"""

from dataclasses import replace

import torch
from torch import Tensor

from nsa_kernels.checks import check_fp8_dims
from nsa_kernels.gpu.append import append_kv
from nsa_kernels.gpu.common import WORKSPACE_BYTES
from nsa_kernels.gpu.decode_cmp import CmpPartials, decode_cmp
from nsa_kernels.gpu.decode_slc import decode_slc
from nsa_kernels.gpu.lse import decode_lse, file_coarse_keys
from nsa_kernels.gpu.plan import GpuPlan, PrefillPlan, ScoreChunk, has_fp8
from nsa_kernels.gpu.prefill_cmp import CmpScores, prefill_cmp
from nsa_kernels.gpu.prefill_merge import combine
from nsa_kernels.gpu.prefill_scores import prefill_scores
from nsa_kernels.gpu.prefill_short import prefill_short
from nsa_kernels.gpu.prefill_slc import prefill_slc, sub_chunk_tokens
from nsa_kernels.gpu.prefill_swa import prefill_swa
from nsa_kernels.gpu.select import select_blocks
from nsa_kernels.gpu.select_groups import select_group_blocks
from nsa_kernels.metadata import BranchKV, LayerCache
from nsa_kernels.reference import CompressionMLP
from nsa_kernels.spec import NSASpec
from nsa_kernels.torch_ops import Gates

# Decode rows times KV heads up to which kernels are launched before the one in front has ended.
MAX_PDL_GROUPS = 16

Compression = tuple[CompressionMLP, CompressionMLP]


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    cache: LayerCache,
    plan: GpuPlan,
    spec: NSASpec,
    *,
    softmax_scale: float,
    compression: Compression | None = None,
    branch_kv: BranchKV | None = None,
    sigmoid_gates: bool = False,
) -> Tensor:
    """Append one step's tokens to a layer's cache and attend: [T, HQ, Dv]. See `ops`.

    No synchronisation with the host; a step of decode rows alone can be captured in a CUDA graph.
    """
    branches = plan.branches
    if not (branches.cmp or branches.slc or branches.swa):
        raise ValueError("no branch is used: every gate is zero")
    if cache.k_scale is not None and not has_fp8(q.device):
        raise ValueError("an FP8 cache needs a GPU of compute capability 8.9 or later")
    if cache.k_scale is not None and q.is_cuda:
        check_fp8_dims(q.shape[2], v.shape[2])
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    num_decode_rows = plan.num_decode_rows
    # The first decode kernel appends its row's token on the way, unless an MLP must come between.
    fused = compression is None and (branches.cmp or branches.slc)
    first_appended = num_decode_rows if fused else 0
    if first_appended < q.shape[0]:
        _append(k, v, cache, plan, spec, compression, branch_kv, first_appended)
        if plan.prefill is not None and branches.slc and spec.lse_len:
            file_coarse_keys(
                cache,
                plan.prefill.lse_window_rows,
                plan.prefill.lse_window_ends,
                plan.page_table,
                spec,
                check=plan.check_bounds,
            )
    if num_decode_rows:
        rows = slice(0, num_decode_rows)
        _decode(
            q[rows],
            k[rows],
            v[rows],
            gates[rows] if isinstance(gates, Tensor) else gates,
            cache,
            plan,
            spec,
            softmax_scale=softmax_scale,
            branch_kv=branch_kv,
            sigmoid_gates=sigmoid_gates,
            fuse_append=fused,
            out=out[rows],
        )
    if plan.prefill is not None:
        _prefill(q, gates, cache, plan, plan.prefill, spec, softmax_scale, sigmoid_gates, out)
    return out


def _append(
    k: Tensor,
    v: Tensor,
    cache: LayerCache,
    plan: GpuPlan,
    spec: NSASpec,
    compression: Compression | None,
    branch_kv: BranchKV | None,
    first_row: int,
) -> None:
    prefill = plan.prefill
    nothing = plan.token_rows[:0]
    append_kv(
        k,
        v,
        cache,
        spec,
        token_rows=plan.token_rows,
        positions=plan.positions,
        seq_lens=plan.seq_lens,
        cu_seqlens_q=plan.cu_seqlens_q,
        page_table=plan.page_table,
        window_rows=nothing if prefill is None else prefill.window_rows,
        window_ends=nothing if prefill is None else prefill.window_ends,
        num_decode_rows=plan.num_decode_rows,
        first_row=first_row,
        compress=plan.branches.cmp or plan.branches.slc,
        mlps=compression,
        branch_kv=branch_kv,
        swa_page_table=plan.swa_page_table,
        check=plan.check_bounds,
    )


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    cache: LayerCache,
    plan: GpuPlan,
    spec: NSASpec,
    *,
    softmax_scale: float,
    branch_kv: BranchKV | None,
    sigmoid_gates: bool,
    fuse_append: bool,
    out: Tensor,
) -> None:
    branches = plan.branches
    # Selection is small enough to start the last kernel under it. In front of selection that pays
    # for small steps only: else the early programs are in the way of those before; measured.
    shape_rows, _ = plan.decode_shape
    launch_pdl = plan.use_pdl and shape_rows * k.shape[1] <= MAX_PDL_GROUPS
    start_last = plan.use_pdl and (branches.slc or launch_pdl)
    partials: CmpPartials | None = None
    lse2_select: Tensor | None = None
    if branches.slc and spec.lse_len:
        lse2_select = decode_lse(
            q,
            k,
            cache,
            plan.seq_lens,
            plan.page_table,
            spec,
            softmax_scale=softmax_scale,
            num_sms=plan.num_sms,
            shape=plan.decode_shape,
            launch_pdl=launch_pdl,
            check=plan.check_bounds,
        )
    if branches.cmp or branches.slc:
        partials = decode_cmp(
            q,
            k,
            v,
            cache,
            plan.seq_lens,
            plan.page_table,
            spec,
            softmax_scale=softmax_scale,
            counters=plan.counters[0],
            num_sms=plan.num_sms,
            shape=plan.decode_shape,
            branch_kv=branch_kv,
            swa_page_table=plan.swa_page_table,
            lse2_select=lse2_select,
            with_output=branches.cmp,
            with_selection=branches.slc,
            fuse_append=fuse_append,
            launch_pdl=launch_pdl,
            start_next=start_last,
            check=plan.check_bounds,
        )
    decode_slc(
        q,
        gates,
        cache,
        plan.seq_lens,
        plan.page_table,
        spec,
        softmax_scale=softmax_scale,
        counters=plan.counters[1],
        num_sms=plan.num_sms,
        shape_rows=shape_rows,
        branches=branches,
        block_indices=None if partials is None else partials.block_indices,
        block_pages=None if partials is None else partials.block_pages,
        o_part=None if partials is None else partials.o_part,
        lse2_part=None if partials is None else partials.lse2_part,
        swa_page_table=plan.swa_page_table,
        sigmoid_gates=sigmoid_gates,
        out=out,
        launch_pdl=start_last and partials is not None,
        early_window=start_last and branches.slc,
        check=plan.check_bounds,
    )


def _prefill(
    q: Tensor,
    gates: Gates,
    cache: LayerCache,
    plan: GpuPlan,
    prefill: PrefillPlan,
    spec: NSASpec,
    softmax_scale: float,
    sigmoid_gates: bool,
    out: Tensor,
) -> None:
    branches, first = plan.branches, prefill.first_token
    o_cmp, block_indices = _prefill_cmp(q, cache, plan, prefill, spec, softmax_scale, out)
    o_swa = None
    if branches.swa and spec.window_size:
        o_swa = torch.empty_like(out)
        prefill_swa(
            q,
            cache,
            spec,
            tile_rows=prefill.tile_rows,
            tile_starts=prefill.tile_starts,
            cu_seqlens_q=plan.cu_seqlens_q,
            seq_lens=plan.seq_lens,
            page_table=plan.page_table if plan.swa_page_table is None else plan.swa_page_table,
            softmax_scale=softmax_scale,
            out=o_swa,
            check=plan.check_bounds,
        )
    if block_indices is None:
        combine(
            o_cmp,
            o_swa,
            gates,
            num_kv_heads=cache.k.shape[1],
            first_token=first,
            num_tokens=len(q) - first,
            out=out,
            sigmoid_gates=sigmoid_gates,
        )
        return
    if prefill.is_short:
        prefill_short(
            q,
            block_indices,
            o_cmp,
            o_swa,
            gates,
            cache,
            spec,
            tile_rows=prefill.tile_rows,
            tile_starts=prefill.tile_starts,
            cu_seqlens_q=plan.cu_seqlens_q,
            seq_lens=plan.seq_lens,
            page_table=plan.page_table,
            softmax_scale=softmax_scale,
            first_token=first,
            out=out,
            sigmoid_gates=sigmoid_gates,
            check=plan.check_bounds,
        )
        return
    step = sub_chunk_tokens(
        WORKSPACE_BYTES,
        spec,
        num_q_heads=q.shape[1],
        num_kv_heads=cache.k.shape[1],
        v_head_dim=out.shape[2],
        dtype=q.dtype,
    )
    for start in range(first, len(q), step):
        stop = min(start + step, len(q))
        prefill_slc(
            q,
            block_indices[start - first : stop - first],
            o_cmp,
            o_swa,
            gates,
            cache,
            plan.token_rows,
            plan.positions,
            plan.seq_lens,
            plan.page_table,
            prefill.cu_blocks,
            spec,
            num_blocks=prefill.num_blocks,
            softmax_scale=softmax_scale,
            first_token=start,
            out=out,
            sigmoid_gates=sigmoid_gates,
            check=plan.check_bounds,
        )


def _prefill_cmp(
    q: Tensor,
    cache: LayerCache,
    plan: GpuPlan,
    prefill: PrefillPlan,
    spec: NSASpec,
    softmax_scale: float,
    out: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Compression branch of all prefill tokens: (o_cmp [T, HQ, Dv], block_indices), None if unused.

    block_indices: [tokens, H, width] int32 of the tokens from `first_token` on. The scores of a
    sub-chunk are used up before the next one writes its own.
    """
    branches, first = plan.branches, prefill.first_token
    o_cmp = block_indices = None
    if branches.cmp:
        o_cmp = torch.empty_like(out)
    if branches.slc:
        block_indices = torch.empty(
            (len(q) - first, cache.k.shape[1], spec.block_table_width),
            dtype=torch.int32,
            device=q.device,
        )
    if not (branches.cmp or branches.slc):
        return None, None

    def run(
        cache: LayerCache, chunk: ScoreChunk, spec: NSASpec, *, output: bool, scores: bool
    ) -> CmpScores:
        return prefill_cmp(
            q,
            cache,
            prefill.tile_rows[chunk.tiles],
            prefill.tile_starts[chunk.tiles],
            plan.cu_seqlens_q,
            plan.seq_lens,
            plan.page_table,
            spec,
            softmax_scale=softmax_scale,
            first_token=chunk.first_token,
            num_tokens=chunk.num_tokens,
            num_score_tiles=chunk.num_score_tiles,
            with_output=output,
            with_scores=scores,
            out=o_cmp,
            check=plan.check_bounds,
        )

    for chunk in prefill.score_chunks:
        tokens = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
        selects = block_indices is not None and not chunk.is_dense
        if block_indices is not None and chunk.is_dense:
            blocks = block_indices[tokens.start - first : tokens.stop - first]
            _select_all(plan.positions[tokens], spec, blocks)
        if not (selects or branches.cmp):
            continue
        with_scores = selects and not prefill.score_pass
        attended = run(cache, chunk, spec, output=branches.cmp, scores=with_scores)
        if block_indices is None or not selects:
            continue
        mine = block_indices[tokens.start - first : tokens.stop - first]
        if cache.k_lse is not None:
            coarse = replace(cache, k_cmp=cache.k_lse, v_cmp=cache.k_lse)
            lse2 = run(coarse, chunk, spec.coarse, output=False, scores=False).lse2
            attended = replace(attended, lse2=lse2)
        if prefill.score_pass:
            scores = prefill_scores(
                q,
                cache,
                attended.lse2,
                prefill.tile_rows[chunk.tiles],
                prefill.tile_starts[chunk.tiles],
                plan.cu_seqlens_q,
                plan.seq_lens,
                plan.page_table,
                spec,
                softmax_scale=softmax_scale,
                first_token=chunk.first_token,
                num_tokens=chunk.num_tokens,
                num_score_tiles=chunk.num_score_tiles,
                check=plan.check_bounds,
            )
            select_group_blocks(scores, plan.positions[tokens], spec, out=mine)
        else:
            select_blocks(
                attended, plan.positions[tokens], spec, num_kv_heads=cache.k.shape[1], out=mine
            )
    return o_cmp, block_indices


def _select_all(positions: Tensor, spec: NSASpec, block_indices: Tensor) -> None:
    """List every block that dense queries at positions [R] see: [R, H, width], -1 for no more."""
    block = torch.arange(block_indices.shape[2], dtype=torch.int32, device=positions.device)
    last = (positions // spec.block_size)[:, None]
    block_indices.copy_(torch.where(block <= last, block, -1)[:, None])
