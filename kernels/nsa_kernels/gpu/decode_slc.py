"""Decode's second and last kernel: selected blocks, sliding window and the gated combination.

Nd decode rows of one token, HQ query heads, H KV heads, G = HQ // H, D and Dv dimensions of keys
and values, S = num_selected_blocks, P pages of the longest row. "lse2" is log2(sum(2 ** s2)) of
scores in base 2, -inf where nothing is visible.

One program per (share of the work, group of query heads, row); the last one to finish a group
combines what all of them left in a workspace. Shares are of three kinds:
  cmp  merge the partial outputs of the compression branch, a few heads each;
  slc  attend to a share of the selected blocks, but for the local ones inside the window;
  swa  attend to a share of the window's pages; where the branches share keys, those of the local
       blocks, which every selection contains, feed a second softmax from the same scores.
So local blocks are read once, and only slc shares depend on the selection: the others can run while
it is being made. A free block that lies in the window is read by both kinds.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.checks import check_shape
from nsa_kernels.gpu.common import LOG2E, split_dim
from nsa_kernels.metadata import LayerCache
from nsa_kernels.spec import NSASpec
from nsa_kernels.torch_ops import Gates
from nsa_kernels.torch_plan import Branches

# A share of fewer tiles spends more on being merged than it saves; this many are in flight at once.
_MIN_SHARE_TILES = 2
# Most shares of one kind: the merge reads all of them in one program.
_MAX_SPLITS = 16
# Compression partials up to this many are merged by the last program, not by programs of their own.
_MAX_FOLDED_CMP_SPLITS = 4
# Partial rows (head, split) of the compression branch that one program merges: at least so many
# while there are programs to spare, at most so many before some are taken from the attention.
_MIN_CMP_ROWS, _MAX_CMP_ROWS = 64, 256
_MAX_CMP_PROGRAMS = 2
# Compression partials up to which selection is quick.
_SHORT_CMP_SPLITS = 16
# Registers of a thread with which three programs of 128 threads share a multiprocessor.
_REGISTERS = 168
# Tiles of a share of the window up to which the program holds all their pages in registers.
MAX_HELD_PAGES = tl.constexpr(32)
# Running maximum before anything was seen: lower than any score, and finite, so that the difference
# to a masked score of -inf is not NaN.
NEVER = tl.constexpr(-1e30)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSlcConfig:
    """How the work of a row and KV head is cut; any values give the same result.

    slc_splits, swa_splits: shares of the selected blocks and of the window.
    cmp_programs: programs that merge the compression branch, 0 = the last program does.
    head_tile: query heads of a group that a program computes, a power of two.
    block_n: tokens of a tile, a power of two of at least 16.
    tiles_in_flight: tiles that a program loads ahead. max_registers: of a thread, None = any.
    """

    slc_splits: int
    swa_splits: int
    cmp_programs: int
    head_tile: int
    block_n: int
    num_warps: int
    tiles_in_flight: int
    max_registers: int | None


def default_config(
    num_rows: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    num_cmp_splits: int,
    dtype: torch.dtype,
    spec: NSASpec,
    num_sms: int,
) -> DecodeSlcConfig:
    """Choose from shapes alone, so that a captured graph stays right as contexts grow."""
    is_fp32 = dtype == torch.float32
    block_n = 32 if is_fp32 else 64
    slc_tiles = triton.cdiv(spec.block_table_width * spec.block_size, block_n)
    swa_tiles = triton.cdiv(_window_pages(spec) * spec.block_size, block_n)
    num_groups = max(num_rows * num_kv_heads, 1)
    head_tile = min(int(triton.next_power_of_2(num_q_heads // num_kv_heads)), 32)
    # With multiprocessors to spare, halve the merge: both halves of the heads read the same pages,
    # once from memory and once from the cache.
    finest = triton.cdiv(slc_tiles + swa_tiles, _MIN_SHARE_TILES)
    if head_tile == 16 and 2 * num_groups * finest <= num_sms:
        head_tile = 8
    num_groups *= triton.cdiv(num_q_heads // num_kv_heads, head_tile)

    small = head_tile <= 16 and head_dim <= 192 and v_head_dim <= 128 and not is_fp32
    # Two programs a multiprocessor; three, where registers allow, if a row's work would else be cut
    # in the two kinds only: the selected blocks are nearly twice the window.
    programs = 2 * num_sms // num_groups
    if small:
        programs = max(programs, min(3, 3 * num_sms // num_groups))
    cmp_rows = num_cmp_splits * head_tile
    cmp_programs = 0
    if num_cmp_splits > _MAX_FOLDED_CMP_SPLITS:
        cmp_programs = min(triton.cdiv(cmp_rows, _MAX_CMP_ROWS), programs // 4)
    share = _MIN_SHARE_TILES  # tiles
    while True:
        slc_splits, swa_splits = triton.cdiv(slc_tiles, share), triton.cdiv(swa_tiles, share)
        fits = slc_splits + swa_splits + cmp_programs <= programs
        if share >= max(slc_tiles, swa_tiles) or (
            fits and max(slc_splits, swa_splits) <= _MAX_SPLITS
        ):
            break
        share += 1
    if cmp_programs:
        spare = min(programs - slc_splits - swa_splits, cmp_rows // _MIN_CMP_ROWS)
        while cmp_programs * 2 <= min(spare, head_tile, _MAX_CMP_PROGRAMS):
            cmp_programs *= 2
    cmp_programs = int(triton.next_power_of_2(cmp_programs)) if cmp_programs else 0
    num_programs = num_groups * (slc_splits + swa_splits + cmp_programs)
    num_warps, tiles_in_flight, max_registers = 4, 2, None
    if small and share <= _MIN_SHARE_TILES:
        # Short shares: what counts is how fast a program loads and merges.
        num_warps, max_registers = 8, 128
        tiles_in_flight = 2 if num_programs <= num_sms else 1
        if num_programs <= num_sms and num_cmp_splits > _SHORT_CMP_SPLITS:
            # Selection among so many blocks outlasts the window's shares: fewer to merge.
            swa_splits = triton.cdiv(swa_tiles, share + 1)
    elif small:
        tiles_in_flight = 1
        max_registers = _REGISTERS if num_programs > 2 * num_sms else None
    return DecodeSlcConfig(
        slc_splits=max(slc_splits, 1),
        swa_splits=max(swa_splits, 1),
        cmp_programs=cmp_programs,
        head_tile=head_tile,
        block_n=block_n,
        num_warps=num_warps,
        tiles_in_flight=tiles_in_flight,
        max_registers=max_registers,
    )


def decode_slc(
    q: Tensor,
    gates: Gates,
    cache: LayerCache,
    seq_lens: Tensor,
    page_table: Tensor,
    spec: NSASpec,
    *,
    softmax_scale: float,
    counters: Tensor,
    num_sms: int,
    shape_rows: int | None = None,
    branches: Branches,
    block_indices: Tensor | None = None,
    block_pages: Tensor | None = None,
    o_part: Tensor | None = None,
    lse2_part: Tensor | None = None,
    swa_page_table: Tensor | None = None,
    sigmoid_gates: bool = False,
    out: Tensor | None = None,
    config: DecodeSlcConfig | None = None,
    launch_pdl: bool = False,
    early_window: bool = False,
    check: bool = False,
) -> Tensor:
    """Attend to selected blocks and the window, add the compression branch: [Nd, HQ, Dv].

    out = g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa (paper, Eq. 5 and 12), zeros for a padding
    row. A branch that is off in `branches`, or a window of 0, contributes nothing.

    q: [Nd, HQ, D], any strides but the last. gates: [Nd, HQ, 3] likewise, logits when
    `sigmoid_gates`, or three constants, which are used as they are.
    seq_lens: [Nd or more] int32 with this step's token, which is in the cache already; 0 = padding.
    page_table: [Nd or more, P] int32; swa_page_table: the same for the window's own pages, needed
    when `cache` has keys of their own for the window.
    block_indices: [Nd, H, width] int32, distinct blocks in any order, the row's local ones among
    them (all, where there are no more than S), -1 for "none"; block_pages: their pages, anything
    for "none". Needed when `branches.slc`. width: `spec.block_table_width`.
    o_part: [Nd, HQ, C, Dv] fp32, outputs of the compression branch, each normalised over its share
    of the context; lse2_part: [Nd, HQ, C] fp32, -inf for an empty share, whose output may be
    unwritten. Needed when `branches.cmp`.
    counters: int32 zeros, at least Nd * H * ceil(G / head_tile) of them (Nd * HQ always suffice);
    they are zero again afterwards. num_sms: multiprocessors of the device.
    out: contiguous, of q's dtype. config: overrides `default_config`, which is that for
    `shape_rows` rows, None = Nd: what is compiled depends on it. launch_pdl: start while the
    kernel before is still running, and wait for it on the device. early_window: with launch_pdl,
    let only those programs wait that read the selection; for when the kernel before writes nothing
    else, lets this one start only after its own wait, and works on memory kept from this call.
    check: assert page ids in range.

    Raises ValueError when shapes do not fit.
    """
    num_rows, num_q_heads, head_dim = q.shape
    num_pages, num_kv_heads, block_size, _ = cache.k.shape
    v_head_dim = cache.v.shape[3]
    group_size = num_q_heads // num_kv_heads
    width = spec.block_table_width
    with_slc, with_swa = branches.slc, branches.swa and spec.window_size > 0
    check_shape("cache.k", cache.k, (num_pages, num_kv_heads, spec.block_size, head_dim))
    if isinstance(gates, Tensor):
        check_shape("gates", gates, (num_rows, num_q_heads, 3))
    if with_slc:
        if block_indices is None or block_pages is None:
            raise ValueError("block_indices and block_pages are needed when branches.slc is on")
        check_shape("block_indices", block_indices, (num_rows, num_kv_heads, width))
        check_shape("block_pages", block_pages, (num_rows, num_kv_heads, width))
    num_cmp_splits = 0
    if branches.cmp:
        if o_part is None or lse2_part is None:
            raise ValueError("o_part and lse2_part are needed when branches.cmp is on")
        num_cmp_splits = o_part.shape[2]
        check_shape("o_part", o_part, (num_rows, num_q_heads, num_cmp_splits, v_head_dim))
        check_shape("lse2_part", lse2_part, (num_rows, num_q_heads, num_cmp_splits))
    k_swa, v_swa = cache.window_kv
    shared = k_swa is cache.k
    if not shared and swa_page_table is None:
        raise ValueError("swa_page_table is needed when the window has keys of its own")
    window_table = page_table if swa_page_table is None else swa_page_table
    if out is None:
        out = torch.empty((num_rows, num_q_heads, v_head_dim), dtype=q.dtype, device=q.device)
    check_shape("out", out, (num_rows, num_q_heads, v_head_dim))
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if num_rows == 0:
        return out

    if config is None:
        config = default_config(
            shape_rows or num_rows,
            num_q_heads,
            num_kv_heads,
            head_dim,
            v_head_dim,
            num_cmp_splits,
            q.dtype,
            spec,
            num_sms,
        )
    head_tile = min(config.head_tile, int(triton.next_power_of_2(group_size)))
    head_tiles = triton.cdiv(group_size, head_tile)
    if counters.numel() < num_rows * num_kv_heads * head_tiles:
        raise ValueError(
            f"counters must hold {num_rows * num_kv_heads * head_tiles} values, "
            f"got {counters.numel()}"
        )
    low_d, high_d = split_dim(head_dim)
    block_n = config.block_n
    slc_tiles = triton.cdiv(width * block_size, block_n)
    swa_tiles = triton.cdiv(_window_pages(spec) * block_size, block_n)
    slc_splits = min(config.slc_splits, slc_tiles) if with_slc else 0
    swa_splits = min(config.swa_splits, swa_tiles) if with_swa else 0
    cmp_programs = min(config.cmp_programs, head_tile) if branches.cmp else 0
    if not slc_splits and not swa_splits:
        cmp_programs = max(cmp_programs, 1)  # someone has to write the output
    shared_kv = with_slc and with_swa and shared
    num_slots = slc_splits + swa_splits * (1 + shared_kv)
    workspace = torch.empty(
        num_rows * num_q_heads * (num_slots * (v_head_dim + 1) + v_head_dim),
        dtype=torch.float32,
        device=q.device,
    )
    # Where a tile spans pages, their ids are loaded ahead too, and take every other stage.
    num_stages = 1 + config.tiles_in_flight * (1 if block_n <= block_size else 2)
    gate_values = (None, None, None) if isinstance(gates, Tensor) else gates
    gate_tensor = gates if isinstance(gates, Tensor) else None
    _decode_slc_kernel[
        (cmp_programs + slc_splits + swa_splits, num_kv_heads * head_tiles, num_rows)
    ](
        q,
        gate_tensor,
        cache.k,
        cache.v,
        cache.k_scale,
        cache.v_scale,
        k_swa,
        v_swa,
        seq_lens,
        window_table,
        block_indices,
        block_pages,
        o_part,
        lse2_part,
        workspace,
        counters,
        out,
        q.stride(0),
        q.stride(1),
        0 if gate_tensor is None else gate_tensor.stride(0),
        0 if gate_tensor is None else gate_tensor.stride(1),
        *gate_values,
        softmax_scale * LOG2E,
        num_pages,
        k_swa.shape[0],
        window_table.stride(0),
        NUM_Q_HEADS=num_q_heads,
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        HEAD_TILE=head_tile,
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        BLOCK_D=low_d,
        BLOCK_D2=high_d,
        BLOCK_DV=max(16, triton.next_power_of_2(v_head_dim)),
        BLOCK_SIZE=block_size,
        NUM_SELECTED=spec.num_selected_blocks,
        WIDTH=width,
        NUM_LOCAL=spec.num_local_blocks,
        WINDOW_SIZE=spec.window_size,
        WITH_CMP=branches.cmp,
        SHARED=shared_kv,
        SIGMOID_GATES=sigmoid_gates,
        CMP_SPLITS=num_cmp_splits,
        CMP_PROGRAMS=cmp_programs,
        SLC_SPLITS=slc_splits,
        SWA_SPLITS=swa_splits,
        SLC_TILES=triton.cdiv(slc_tiles, max(slc_splits, 1)),
        SWA_TILES=triton.cdiv(swa_tiles, max(swa_splits, 1)),
        BLOCK_N=block_n,
        CHECK=check,
        USE_PDL=launch_pdl,
        EARLY_WINDOW=early_window,
        # With more programs than that, loads in all of them cost more than the last one waits.
        EARLY_GATES=config.num_warps > 4,
        num_warps=config.num_warps,
        num_stages=num_stages,
        maxnreg=config.max_registers,
        debug=check,
        **({"launch_pdl": True} if launch_pdl else {}),
    )
    return out


def _window_pages(spec: NSASpec) -> int:
    """Most pages that a window touches."""
    if spec.window_size == 0:
        return 0
    return (spec.window_size + spec.block_size - 2) // spec.block_size + 1


# What changes from step to step must not compile the kernel anew; the counters are the second half
# of a tensor, which begins where the batch and the number of heads put it.
@triton.jit(
    do_not_specialize=["num_pages", "num_swa_pages", "table_width"],
    do_not_specialize_on_alignment=["counters_ptr"],
)
def _decode_slc_kernel(
    q_ptr,  # [Nd, HQ, D]
    gates_ptr,  # [Nd, HQ, 3] or None
    k_ptr,  # [num_pages, H, BLOCK_SIZE, D]
    v_ptr,
    k_scale_ptr,  # [H], None where the cache is not FP8
    v_scale_ptr,
    k_swa_ptr,  # the same as k_ptr where branches share keys
    v_swa_ptr,
    seq_lens_ptr,
    window_table_ptr,
    block_indices_ptr,  # [Nd, H, WIDTH]
    block_pages_ptr,
    cmp_o_ptr,  # [Nd, HQ, CMP_SPLITS, Dv]
    cmp_lse_ptr,
    workspace_ptr,
    counters_ptr,
    out_ptr,
    stride_qt,
    stride_qh,
    stride_gt,
    stride_gh,
    gate_cmp,
    gate_slc,
    gate_swa,
    qk_scale,
    num_pages,
    num_swa_pages,
    table_width,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    WINDOW_SIZE: tl.constexpr,
    WITH_CMP: tl.constexpr,
    SHARED: tl.constexpr,
    SIGMOID_GATES: tl.constexpr,
    CMP_SPLITS: tl.constexpr,
    CMP_PROGRAMS: tl.constexpr,
    SLC_SPLITS: tl.constexpr,
    SWA_SPLITS: tl.constexpr,
    SLC_TILES: tl.constexpr,
    SWA_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECK: tl.constexpr,
    USE_PDL: tl.constexpr,
    EARLY_WINDOW: tl.constexpr,
    EARLY_GATES: tl.constexpr,
):
    # Slots of a head's partial outputs: slc shares, what swa shares saw of selected blocks, swa.
    SLC_SLOTS: tl.constexpr = SLC_SPLITS + SWA_SPLITS * SHARED
    NUM_SLOTS: tl.constexpr = SLC_SLOTS + SWA_SPLITS
    NUM_PROGRAMS: tl.constexpr = CMP_PROGRAMS + SLC_SPLITS + SWA_SPLITS
    HEAD_TILES: tl.constexpr = (GROUP_SIZE + HEAD_TILE - 1) // HEAD_TILE
    role = tl.program_id(0)
    if USE_PDL and not EARLY_WINDOW:
        tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(1) // HEAD_TILES
    head_start = tl.program_id(1) % HEAD_TILES * HEAD_TILE
    row = tl.program_id(2).to(tl.int64)
    first_head = row * NUM_Q_HEADS + kv_head * GROUP_SIZE  # of [Nd, HQ]
    num_heads = tl.num_programs(2).to(tl.int64) * NUM_Q_HEADS
    lse_ptr = workspace_ptr + num_heads * (NUM_SLOTS * V_HEAD_DIM)
    cmp_merged_ptr = lse_ptr + num_heads * NUM_SLOTS
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_dv = offs_dv < V_HEAD_DIM

    offs_h = head_start + tl.arange(0, HEAD_TILE)
    mask_h = offs_h < GROUP_SIZE
    out_ptrs = out_ptr + (first_head + offs_h)[:, None] * V_HEAD_DIM + offs_dv[None, :]
    mask_out = mask_h[:, None] & mask_dv[None, :]
    seq_len = tl.load(seq_lens_ptr + row)
    if k_scale_ptr is not None:
        qk_scale *= tl.load(k_scale_ptr + kv_head)
    ROWS: tl.constexpr = max(HEAD_TILE, 16)
    offs_m = tl.arange(0, ROWS)
    mask_m = (offs_m < HEAD_TILE) & (head_start + offs_m < GROUP_SIZE)
    q_ptrs = q_ptr + row * stride_qt + (kv_head * GROUP_SIZE + head_start) * stride_qh
    q_ptrs += offs_m * stride_qh
    selected = (row * NUM_KV_HEADS + kv_head) * WIDTH
    if role < CMP_PROGRAMS:
        if WITH_CMP and CMP_PROGRAMS > 0:
            CMP_HEADS: tl.constexpr = HEAD_TILE // CMP_PROGRAMS
            _merge_heads(
                cmp_o_ptr,
                cmp_lse_ptr,
                cmp_merged_ptr,
                first_head,
                head_start + role * CMP_HEADS,
                GROUP_SIZE,
                CMP_HEADS,
                CMP_SPLITS,
                V_HEAD_DIM,
                BLOCK_DV,
            )
    elif role < CMP_PROGRAMS + SLC_SPLITS:
        if SLC_SPLITS > 0:
            _attend_selected(
                q_ptrs,
                mask_m,
                k_ptr,
                v_ptr,
                block_indices_ptr + selected,
                block_pages_ptr + selected,
                workspace_ptr,
                lse_ptr,
                first_head + head_start,
                kv_head,
                role - CMP_PROGRAMS,
                seq_len,
                qk_scale,
                num_pages,
                NUM_SLOTS,
                SLC_TILES,
                NUM_KV_HEADS,
                HEAD_DIM,
                V_HEAD_DIM,
                BLOCK_D,
                BLOCK_D2,
                BLOCK_DV,
                BLOCK_SIZE,
                NUM_SELECTED,
                WIDTH,
                NUM_LOCAL,
                WINDOW_SIZE,
                SHARED,
                BLOCK_N,
                USE_PDL and EARLY_WINDOW,
                CHECK,
            )
    else:
        if SWA_SPLITS > 0:
            _attend_window(
                q_ptrs,
                mask_m,
                k_swa_ptr,
                v_swa_ptr,
                window_table_ptr + row * table_width,
                workspace_ptr,
                lse_ptr,
                first_head + head_start,
                kv_head,
                role - (CMP_PROGRAMS + SLC_SPLITS),
                seq_len,
                qk_scale,
                num_swa_pages,
                SLC_SPLITS,
                SLC_SLOTS,
                NUM_SLOTS,
                SWA_TILES,
                NUM_KV_HEADS,
                HEAD_DIM,
                V_HEAD_DIM,
                BLOCK_D,
                BLOCK_D2,
                BLOCK_DV,
                BLOCK_SIZE,
                NUM_SELECTED,
                NUM_LOCAL,
                WINDOW_SIZE,
                SHARED,
                BLOCK_N,
                CHECK,
            )

    gates_row = row * stride_gt + (kv_head * GROUP_SIZE + offs_h) * stride_gh
    if EARLY_GATES:
        # By every program, so that the last one need not wait for them.
        g_cmp = _load_gate(gates_ptr, gates_row, mask_h, gate_cmp, SIGMOID_GATES)
        g_slc = _load_gate(gates_ptr, gates_row + 1, mask_h, gate_slc, SIGMOID_GATES)
        g_swa = _load_gate(gates_ptr, gates_row + 2, mask_h, gate_swa, SIGMOID_GATES)
    # The barrier orders every thread's stores before the one atomic that releases them.
    tl.debug_barrier()
    counter_ptr = counters_ptr + row * (NUM_KV_HEADS * HEAD_TILES) + tl.program_id(1)
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    if arrived == NUM_PROGRAMS - 1:
        tl.store(counter_ptr, 0)
        if not EARLY_GATES:
            g_cmp = _load_gate(gates_ptr, gates_row, mask_h, gate_cmp, SIGMOID_GATES)
            g_slc = _load_gate(gates_ptr, gates_row + 1, mask_h, gate_slc, SIGMOID_GATES)
            g_swa = _load_gate(gates_ptr, gates_row + 2, mask_h, gate_swa, SIGMOID_GATES)
        if v_scale_ptr is not None:
            # The compression branch is in units of 1 already.
            v_scale = tl.load(v_scale_ptr + kv_head)
            g_slc *= v_scale
            g_swa *= v_scale
        out = tl.zeros([HEAD_TILE, BLOCK_DV], tl.float32)
        if SLC_SPLITS > 0:
            o_slc = _merge(
                workspace_ptr,
                lse_ptr,
                (first_head + offs_h) * NUM_SLOTS,
                mask_h,
                SLC_SLOTS,
                V_HEAD_DIM,
                BLOCK_DV,
            )
            out += g_slc * o_slc
        if SWA_SPLITS > 0:
            o_swa = _merge(
                workspace_ptr,
                lse_ptr,
                (first_head + offs_h) * NUM_SLOTS + SLC_SLOTS,
                mask_h,
                SWA_SPLITS,
                V_HEAD_DIM,
                BLOCK_DV,
            )
            out += g_swa * o_swa
        if WITH_CMP:
            if CMP_PROGRAMS > 0:
                o_cmp = tl.load(
                    cmp_merged_ptr + (first_head + offs_h)[:, None] * V_HEAD_DIM + offs_dv[None, :],
                    mask=mask_out,
                    other=0.0,
                    cache_modifier=".cg",
                )
            else:
                o_cmp = _merge(
                    cmp_o_ptr,
                    cmp_lse_ptr,
                    (first_head + offs_h) * CMP_SPLITS,
                    mask_h,
                    CMP_SPLITS,
                    V_HEAD_DIM,
                    BLOCK_DV,
                )
            out += g_cmp * o_cmp
        out = tl.where(seq_len > 0, out, 0.0)
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_out)


@triton.jit
def _merge_heads(
    o_ptr,
    lse_ptr,
    merged_ptr,
    first_head,
    head_start,
    GROUP_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    COUNT: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Merge the COUNT partial outputs of NUM_HEADS heads of the group, into fp32 [Nd, HQ, Dv]."""
    offs_dv = tl.arange(0, BLOCK_DV)
    heads = head_start + tl.arange(0, NUM_HEADS)
    mask_h = heads < GROUP_SIZE
    slots = (first_head + heads) * COUNT
    o = _merge(o_ptr, lse_ptr, slots, mask_h, COUNT, V_HEAD_DIM, BLOCK_DV)
    tl.store(
        merged_ptr + (first_head + heads)[:, None] * V_HEAD_DIM + offs_dv[None, :],
        o,
        mask=mask_h[:, None] & (offs_dv[None, :] < V_HEAD_DIM),
    )


@triton.jit
def _attend_selected(
    q_ptrs,
    mask_m,
    k_ptr,
    v_ptr,
    blocks_ptr,
    pages_ptr,
    o_ptr,
    lse_ptr,
    first_head,
    kv_head,
    share,
    seq_len,
    qk_scale,
    num_pages,
    NUM_SLOTS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    WINDOW_SIZE: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WAIT: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Attend to a share of the selected blocks; where SHARED, not to local ones in the window."""
    ROWS: tl.constexpr = q_ptrs.shape[0]
    m_i = tl.full([ROWS], NEVER, tl.float32)
    l_i = tl.zeros([ROWS, BLOCK_N], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    local_block = _local_block(seq_len, WINDOW_SIZE, BLOCK_SIZE, NUM_SELECTED, NUM_LOCAL)
    first_item = share * NUM_TILES * BLOCK_N // BLOCK_SIZE
    offs_i = _share_items(NUM_TILES, BLOCK_N, BLOCK_SIZE)
    exists = first_item + offs_i < WIDTH
    if WAIT:
        # As late as possible: what does not depend on the selection is then on its way.
        q, q2 = _load_q(q_ptrs, mask_m, HEAD_DIM, BLOCK_D, BLOCK_D2)
        tl.extra.cuda.gdc_wait()
    blocks = tl.load(blocks_ptr + first_item + offs_i, mask=exists, other=-1)
    pages = tl.load(pages_ptr + first_item + offs_i, mask=exists, other=0)
    if not WAIT:
        q, q2 = _load_q(q_ptrs, mask_m, HEAD_DIM, BLOCK_D, BLOCK_D2)
    for i in range(tl.where(seq_len > 0, NUM_TILES, 0)):
        item, offs = _split_tokens((share * NUM_TILES + i) * BLOCK_N, BLOCK_SIZE, BLOCK_N)
        if BLOCK_N <= BLOCK_SIZE:
            block = _pick(blocks, offs_i, item - first_item)
            page = _pick(pages, offs_i, item - first_item)
        else:
            block = tl.load(blocks_ptr + item, mask=item < WIDTH, other=-1)
            page = tl.load(pages_ptr + item, mask=item < WIDTH, other=0)
        wanted = block >= 0
        if SHARED:
            wanted = wanted & (block < local_block)
        visible = wanted & (block * BLOCK_SIZE + offs < seq_len)
        if CHECK:
            in_range = (page >= 0) & (page < num_pages)
            tl.device_assert(in_range | (block < 0), "block_pages out of range")
        k, k2, v = _load_kv(
            k_ptr,
            v_ptr,
            kv_head,
            page,
            offs,
            visible,
            NUM_KV_HEADS,
            HEAD_DIM,
            V_HEAD_DIM,
            BLOCK_D,
            BLOCK_D2,
            BLOCK_DV,
            BLOCK_SIZE,
            BLOCK_N,
        )
        v = v.to(q.dtype)
        s = _scores(q, q2, k, k2, qk_scale, BLOCK_D2)
        m_i, l_i, acc = _attend(s, v, visible, m_i, l_i, acc)
    slots = (first_head + tl.arange(0, ROWS)) * NUM_SLOTS + share
    _store_partial(o_ptr, lse_ptr, slots, mask_m, m_i, l_i, acc, V_HEAD_DIM, BLOCK_DV)


@triton.jit
def _attend_window(
    q_ptrs,
    mask_m,
    k_ptr,
    v_ptr,
    table_ptr,
    o_ptr,
    lse_ptr,
    first_head,
    kv_head,
    share,
    seq_len,
    qk_scale,
    num_pages,
    SLC_SPLITS: tl.constexpr,
    SLC_SLOTS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    WINDOW_SIZE: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Attend to a share of the window's pages; where SHARED, for the local blocks' sake as well.

    The scores are the same for both, the masks are not: a running softmax each.
    """
    # A window that most contexts do not fill (attention that is dense at any length, say): shares
    # are cut from what is there of it, and pages looked up one by one.
    LONG: tl.constexpr = NUM_TILES > MAX_HELD_PAGES
    ROWS: tl.constexpr = q_ptrs.shape[0]
    m_i = tl.full([ROWS], NEVER, tl.float32)
    l_i = tl.zeros([ROWS, BLOCK_N], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    window_start = tl.maximum(seq_len - WINDOW_SIZE, 0)
    local_block = _local_block(seq_len, WINDOW_SIZE, BLOCK_SIZE, NUM_SELECTED, NUM_LOCAL)
    first_block = window_start // BLOCK_SIZE
    num_blocks = (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    first_item = share * NUM_TILES * BLOCK_N // BLOCK_SIZE
    offs_i = _share_items(NUM_TILES, BLOCK_N, BLOCK_SIZE)
    if not LONG:
        share_blocks = first_block + first_item + offs_i
        pages = tl.load(table_ptr + share_blocks, mask=share_blocks < num_blocks, other=0)
    if SHARED:
        m_slc, l_slc, acc_slc = m_i, l_i, acc
    q, q2 = _load_q(q_ptrs, mask_m, HEAD_DIM, BLOCK_D, BLOCK_D2)
    used_tiles = ((num_blocks - first_block) * BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    num_tiles = NUM_TILES
    if LONG:
        num_tiles = (used_tiles + NUM_SLOTS - SLC_SLOTS - 1) // (NUM_SLOTS - SLC_SLOTS)
    for i in range(tl.minimum(used_tiles - share * num_tiles, num_tiles)):
        item, offs = _split_tokens((share * num_tiles + i) * BLOCK_N, BLOCK_SIZE, BLOCK_N)
        block = first_block + item
        if BLOCK_N <= BLOCK_SIZE and not LONG:
            page = _pick(pages, offs_i, item - first_item)
        else:
            page = tl.load(table_ptr + block, mask=block < num_blocks, other=0)
        token = block * BLOCK_SIZE + offs
        visible = (token >= window_start) & (token < seq_len)
        if CHECK:
            tl.device_assert((page >= 0) & (page < num_pages), "window page out of range")
        k, k2, v = _load_kv(
            k_ptr,
            v_ptr,
            kv_head,
            page,
            offs,
            visible,
            NUM_KV_HEADS,
            HEAD_DIM,
            V_HEAD_DIM,
            BLOCK_D,
            BLOCK_D2,
            BLOCK_DV,
            BLOCK_SIZE,
            BLOCK_N,
        )
        v = v.to(q.dtype)
        s = _scores(q, q2, k, k2, qk_scale, BLOCK_D2)
        m_i, l_i, acc = _attend(s, v, visible, m_i, l_i, acc)
        if SHARED:
            chosen = visible & (block >= local_block)
            m_slc, l_slc, acc_slc = _attend(s, v, chosen, m_slc, l_slc, acc_slc)
    slots = (first_head + tl.arange(0, ROWS)) * NUM_SLOTS + share
    _store_partial(o_ptr, lse_ptr, slots + SLC_SLOTS, mask_m, m_i, l_i, acc, V_HEAD_DIM, BLOCK_DV)
    if SHARED:
        _store_partial(
            o_ptr,
            lse_ptr,
            slots + SLC_SPLITS,
            mask_m,
            m_slc,
            l_slc,
            acc_slc,
            V_HEAD_DIM,
            BLOCK_DV,
        )


@triton.jit
def _local_block(
    seq_len,
    WINDOW_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
):
    """First block that is in every selection with all after it, and with all tokens in the window.

    The former are the local blocks, under any rule of selection, or all where they fit.
    """
    num_blocks = (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    first_local = tl.where(num_blocks <= NUM_SELECTED, 0, num_blocks - NUM_LOCAL)
    inner = (tl.maximum(seq_len - WINDOW_SIZE, 0) + BLOCK_SIZE - 1) // BLOCK_SIZE
    return tl.maximum(inner, first_local)


@triton.jit
def _load_q(
    q_ptrs,
    mask_m,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr,
):
    """Load the queries in two parts, 0 outside; the second is the first where BLOCK_D2 is 0.

    After the page ids: whoever needs q first waits for it.
    """
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptrs[:, None] + offs_d[None, :], mask=mask, other=0.0)
    q2 = q
    if BLOCK_D2 > 0:
        offs_d2 = BLOCK_D + tl.arange(0, BLOCK_D2)
        mask = mask_m[:, None] & (offs_d2 < HEAD_DIM)[None, :]
        q2 = tl.load(q_ptrs[:, None] + offs_d2[None, :], mask=mask, other=0.0)
    return q, q2


@triton.jit
def _split_tokens(start, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Map a tile of the concatenated pages to (page of the list, token in the page).

    The first is a scalar where a tile lies within a page, which spares address arithmetic.
    """
    offs_n = tl.arange(0, BLOCK_N)
    if BLOCK_N <= BLOCK_SIZE:
        item = start // BLOCK_SIZE
        offs = start % BLOCK_SIZE + offs_n
    else:
        item = start // BLOCK_SIZE + offs_n // BLOCK_SIZE
        offs = offs_n % BLOCK_SIZE
    return item, offs


@triton.jit
def _share_items(NUM_TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Offsets of the pages that a share touches, wherever in a page it begins."""
    TOKENS: tl.constexpr = NUM_TILES * BLOCK_N
    LATEST: tl.constexpr = BLOCK_SIZE - BLOCK_N if TOKENS % BLOCK_SIZE else 0
    return tl.arange(0, triton.next_power_of_2((LATEST + TOKENS - 1) // BLOCK_SIZE + 1))


@triton.jit
def _pick(values, offsets, index):
    """values[index] from registers: no load that the loads of the page would wait for."""
    return tl.sum(tl.where(offsets == index, values, 0), axis=0)


@triton.jit
def _load_kv(
    k_ptr,
    v_ptr,
    kv_head,
    page,
    offs,
    visible,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Load a tile's keys [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_D2], and values [.., BLOCK_DV].

    0 where not visible. The second part of the keys is the first where BLOCK_D2 is 0.
    """
    start = (page.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE
    if BLOCK_N <= BLOCK_SIZE:
        k_rows = k_ptr + start * HEAD_DIM + offs * HEAD_DIM
        v_rows = v_ptr + start * V_HEAD_DIM + offs * V_HEAD_DIM
    else:
        k_rows = k_ptr + (start + offs) * HEAD_DIM
        v_rows = v_ptr + (start + offs) * V_HEAD_DIM
    k = _load_tile(k_rows, visible, 0, BLOCK_D, HEAD_DIM)
    k2 = k
    if BLOCK_D2 > 0:
        k2 = _load_tile(k_rows, visible, BLOCK_D, BLOCK_D2, HEAD_DIM)
    return k, k2, _load_tile(v_rows, visible, 0, BLOCK_DV, V_HEAD_DIM)


@triton.jit
def _load_tile(rows, visible, FIRST: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Load BLOCK columns from FIRST on, at row pointers [N]; 0 where not visible or past DIM."""
    offs = FIRST + tl.arange(0, BLOCK)
    mask = visible[:, None]
    # A mask along the row would keep the compiler from 16-byte copies of an even one.
    if FIRST + BLOCK > DIM:
        mask = mask & (offs < DIM)[None, :]
    return tl.load(rows[:, None] + offs[None, :], mask=mask, other=0.0)


@triton.jit
def _scores(q, q2, k, k2, qk_scale, BLOCK_D2: tl.constexpr):
    """Score a tile's keys in base 2: [M, BLOCK_N]."""
    s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    if BLOCK_D2 > 0:
        s = tl.dot(q2, tl.trans(k2.to(q.dtype)), s, input_precision="ieee")
    return s * qk_scale


@triton.jit
def _attend(s, v, visible, m_i, l_i, acc):
    """Add a tile to the running softmax (maximum m_i, sum l_i, output acc) of the rows.

    l_i [M, BLOCK_N] is summed over its columns at the end: a sum across warps costs two barriers.
    """
    s = tl.where(visible[None, :], s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, axis=1))
    p = tl.exp2(s - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_new = l_i * alpha[:, None] + p
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return m_new, l_new, acc


@triton.jit
def _store_partial(
    o_ptr,
    lse_ptr,
    slots,
    mask_m,
    m_i,
    l_i,
    acc,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Leave normalised outputs and their lse2 in the workspace; an empty one only the latter."""
    offs_dv = tl.arange(0, BLOCK_DV)
    l_i = tl.sum(l_i, axis=1)
    # Not l_i > 0: a NaN must go on to where it is noticed.
    seen = l_i != 0
    o = acc / tl.where(seen, l_i, 1.0)[:, None]
    lse2 = tl.where(seen, m_i + tl.log2(tl.where(seen, l_i, 1.0)), float("-inf"))
    tl.store(
        o_ptr + slots[:, None] * V_HEAD_DIM + offs_dv[None, :],
        o,
        mask=(mask_m & seen)[:, None] & (offs_dv[None, :] < V_HEAD_DIM),
    )
    tl.store(lse_ptr + slots, lse2, mask=mask_m)


@triton.jit
def _merge(
    o_ptr,
    lse_ptr,
    slots,
    mask_h,
    COUNT: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Combine COUNT partial outputs of every head, at slots[h] and after: [heads, BLOCK_DV].

    Nothing is read on a condition that must be loaded first, so all loads are in flight at once;
    what an empty share left unwritten is dropped after reading.
    """
    UNROLL: tl.constexpr = min(triton.next_power_of_2(COUNT), 16)
    offs_dv = tl.arange(0, BLOCK_DV)
    m = tl.full([slots.shape[0]], NEVER, tl.float32)
    total = tl.zeros([slots.shape[0]], tl.float32)
    acc = tl.zeros([slots.shape[0], BLOCK_DV], tl.float32)
    for start in range(0, COUNT, UNROLL):
        for i in tl.static_range(UNROLL):
            exists = mask_h & (start + i < COUNT)
            # Other multiprocessors wrote these: ".cg" reads past the cache of this one.
            lse2 = tl.load(
                lse_ptr + slots + (start + i),
                mask=exists,
                other=float("-inf"),
                cache_modifier=".cg",
            )
            o = tl.load(
                o_ptr + (slots + (start + i))[:, None] * V_HEAD_DIM + offs_dv[None, :],
                mask=exists[:, None] & (offs_dv[None, :] < V_HEAD_DIM),
                other=0.0,
                cache_modifier=".cg",
            )
            o = tl.where(lse2[:, None] > float("-inf"), o, 0.0)
            m_new = tl.maximum(m, lse2)
            alpha, weight = tl.exp2(m - m_new), tl.exp2(lse2 - m_new)
            total = total * alpha + weight
            acc = acc * alpha[:, None] + o * weight[:, None]
            m = m_new
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _load_gate(gates_ptr, offsets, mask_h, constant, SIGMOID_GATES: tl.constexpr):
    """Load the heads' gates, or spread the constant over them: [heads, 1] fp32."""
    if gates_ptr is None:
        gate = tl.zeros(mask_h.shape, tl.float32) + constant
    else:
        gate = tl.load(gates_ptr + offsets, mask=mask_h, other=0.0).to(tl.float32)
        if SIGMOID_GATES:
            gate = tl.sigmoid(gate)
    return gate[:, None]
