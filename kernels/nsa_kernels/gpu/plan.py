"""One step for the Triton path: small integer tensors on the device, shared by all layers.

B rows, Nd of them decode rows (one token each, in front), T tokens, P pages of the longest row,
HQ query heads, H KV heads.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nsa_kernels.gpu.common import (
    WORKSPACE_BYTES,
    check_geometry,
    group_score_bytes_per_token,
    prefill_block_q,
    score_bytes_per_token,
    score_tile_entries,
)
from nsa_kernels.gpu.prefill_scores import can_score_pass, prefers_score_pass
from nsa_kernels.gpu.prefill_short import short_context
from nsa_kernels.metadata import AttnMetadata
from nsa_kernels.spec import NSASpec
from nsa_kernels.torch_plan import Branches


@dataclass(frozen=True, slots=True)
class ScoreChunk:
    """A run of prefill tiles whose block scores fit into the workspace together.

    tiles: of `PrefillPlan.tile_starts`. Their tokens are [first_token, first_token + num_tokens),
    and the last of them sees `num_score_tiles` score tiles. is_dense: all of them select every
    block that they see.
    """

    tiles: slice
    first_token: int
    num_tokens: int
    num_score_tiles: int
    is_dense: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """The prefill chunks of a step: tokens [first_token, T).

    tile_rows, tile_starts: [tiles] int32; tile i is the tokens tile_starts[i] and after, at most
    `prefill_block_q` of them, of row tile_rows[i].
    window_rows, window_ends: [W] int32, row of every window that closes, and the number of tokens
    up to its end. lse_window_rows, lse_window_ends: the same of the coarse windows.
    cu_blocks: [B + 1] int32, prefix sums of the rows' block counts; num_blocks: their total.
    is_short: contexts are so short that attending to all of them with a mask is faster.
    score_pass: block scores are computed after compression attention (`prefill_scores`), not in it.
    """

    first_token: int
    tile_rows: Tensor
    tile_starts: Tensor
    window_rows: Tensor
    window_ends: Tensor
    lse_window_rows: Tensor
    lse_window_ends: Tensor
    cu_blocks: Tensor
    num_blocks: int
    score_chunks: list[ScoreChunk]
    is_short: bool
    score_pass: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlan:
    """One step for the Triton kernels; all tensors are int32 on the device.

    seq_lens: [B], tokens in the cache after the step, 0 for a padding row. page_table: [B, P].
    cu_seqlens_q: [B + 1]. token_rows, positions: [T]. swa_page_table: [B, P], None where branches
    share keys and values; an entry behind the row's windows is never read.
    counters: [2, Nd * HQ], zero between kernels: programs of a decode row count their arrivals.
    decode_shape: rows and pages that the decode kernels are cut for, at least Nd and P. What is
    compiled for them depends on these two and not on Nd and P.
    use_pdl: launch the decode kernels early, each waiting on the device for the one before.
    """

    branches: Branches
    num_decode_rows: int
    decode_shape: tuple[int, int]
    seq_lens: Tensor
    page_table: Tensor
    cu_seqlens_q: Tensor
    token_rows: Tensor
    positions: Tensor
    swa_page_table: Tensor | None
    counters: Tensor
    prefill: PrefillPlan | None
    num_sms: int
    use_pdl: bool
    check_bounds: bool


def plan_attention(
    meta: AttnMetadata,
    spec: NSASpec,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    branches: Branches | None = None,
    check_bounds: bool = False,
    score_pass: bool | None = None,
) -> GpuPlan:
    """Plan one step; see `ops.plan_attention`. One copy to the device, no synchronisation.

    score_pass: how prefill scores blocks, see `PrefillPlan`; None: `prefers_score_pass`. Raises
    ValueError where it is True for a dialect that it cannot score.
    """
    check_geometry(spec)
    if score_pass is None:
        score_pass = can_score_pass(spec) and prefers_score_pass(num_q_heads // num_kv_heads, spec)
    elif score_pass and not can_score_pass(spec):
        raise ValueError("score_pass has no dense_len and no lse_len: leave it out, or pass False")
    cu_seqlens = meta.cu_seqlens_q.numpy()
    num_rows, num_decode_rows = len(meta.seq_lens), meta.num_decode_rows
    token_rows = np.repeat(np.arange(num_rows, dtype=np.int32), np.diff(cu_seqlens))
    host = {
        "seq_lens": meta.seq_lens.numpy(),
        "page_table": meta.page_table.numpy(),
        "cu_seqlens_q": cu_seqlens,
        "token_rows": token_rows,
        "positions": meta.positions.numpy(),
        "counters": np.zeros((2, num_decode_rows * num_q_heads), dtype=np.int32),
    }
    if meta.branches is not None:
        host["swa_page_table"] = meta.branches.swa_page_table.numpy()
    score_chunks: list[ScoreChunk] = []
    is_dense = False
    if num_decode_rows < num_rows:
        tiles = _tiles(cu_seqlens, num_decode_rows, prefill_block_q(num_q_heads // num_kv_heads))
        host["tile_rows"], host["tile_starts"] = tiles
        host["window_rows"], host["window_ends"] = _closing_windows(
            meta, token_rows, spec.cmp_len, spec.cmp_stride
        )
        host["lse_window_rows"], host["lse_window_ends"] = _closing_windows(
            meta, token_rows, spec.lse_len, spec.lse_stride
        )
        num_blocks = -(-meta.seq_lens.numpy() // spec.block_size)
        host["cu_blocks"] = np.concatenate(([0], np.cumsum(num_blocks)))
        cost = (
            group_score_bytes_per_token(num_kv_heads, 1, spec)
            if score_pass
            else score_bytes_per_token(num_q_heads, 1, dtype, spec)
        )
        score_chunks = _score_chunks(meta, tiles[1], cost, spec)
        is_dense = all(chunk.is_dense for chunk in score_chunks)
    sent = _send(host, device)
    prefill = None
    if score_chunks:
        prefill = PrefillPlan(
            first_token=num_decode_rows,
            tile_rows=sent["tile_rows"],
            tile_starts=sent["tile_starts"],
            window_rows=sent["window_rows"],
            window_ends=sent["window_ends"],
            lse_window_rows=sent["lse_window_rows"],
            lse_window_ends=sent["lse_window_ends"],
            cu_blocks=sent["cu_blocks"],
            num_blocks=int(host["cu_blocks"][-1]),
            score_chunks=score_chunks,
            is_short=is_dense
            or float(meta.positions[num_decode_rows:].double().mean()) < short_context(spec),
            score_pass=score_pass,
        )
    return GpuPlan(
        branches=branches or Branches(),
        num_decode_rows=num_decode_rows,
        decode_shape=(num_decode_rows, meta.page_table.shape[1]),
        seq_lens=sent["seq_lens"],
        page_table=sent["page_table"],
        cu_seqlens_q=sent["cu_seqlens_q"],
        token_rows=sent["token_rows"],
        positions=sent["positions"],
        swa_page_table=sent.get("swa_page_table"),
        counters=sent["counters"],
        prefill=prefill,
        num_sms=num_multiprocessors(device),
        use_pdl=has_dependent_launch(device),
        check_bounds=check_bounds,
    )


def plan_decode(
    seq_lens: Tensor,
    positions: Tensor,
    page_table: Tensor,
    counters: Tensor,
    spec: NSASpec,
    *,
    num_q_heads: int,
    branches: Branches,
    swa_page_table: Tensor | None = None,
) -> GpuPlan:
    """Plan a step of decode rows alone around tensors on the device, for capture in a CUDA graph.

    seq_lens, positions: [B] int32. page_table: [B, P] int32, rows may be strided. counters:
    [2, B * num_q_heads or more] int32 zeros; kernels leave zeros behind. swa_page_table: [B, P]
    int32 likewise, where branches have keys and values of their own.
    """
    check_geometry(spec)
    num_rows, device = len(seq_lens), seq_lens.device
    index = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
    return GpuPlan(
        branches=branches,
        num_decode_rows=num_rows,
        decode_shape=(num_rows, page_table.shape[1]),
        seq_lens=seq_lens,
        page_table=page_table,
        cu_seqlens_q=index,
        token_rows=index[:num_rows],
        positions=positions,
        swa_page_table=swa_page_table,
        counters=counters[:, : num_rows * num_q_heads],
        prefill=None,
        num_sms=num_multiprocessors(device),
        use_pdl=has_dependent_launch(device),
        check_bounds=False,
    )


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; those of an H100 where there is none (Triton's interpreter)."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it still runs (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def has_fp8(device: torch.device) -> bool:
    """Whether a device's kernels convert to and from FP8; Triton's interpreter does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _send(host: dict[str, npt.NDArray[np.integer]], device: torch.device) -> dict[str, Tensor]:
    """Copy all arrays to the device at once, as int32."""
    # Each starts on 16 bytes, so that kernels are compiled for aligned pointers whatever the sizes.
    sizes = [-(-array.size // 4) * 4 for array in host.values()]
    packed = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    view = packed.numpy()
    offset = 0
    for array, size in zip(host.values(), sizes, strict=True):
        view[offset : offset + array.size] = array.reshape(-1)
        offset += size
    on_device = packed.to(device, non_blocking=True).split(sizes)
    return {
        name: part[: array.size].view(array.shape)
        for (name, array), part in zip(host.items(), on_device, strict=True)
    }


def _tiles(
    cu_seqlens: npt.NDArray[np.integer], first_row: int, block_q: int
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Row and first token of every tile of the rows from `first_row` on."""
    lens = np.diff(cu_seqlens)[first_row:]
    counts = -(-lens // block_q)
    rows = np.repeat(np.arange(first_row, first_row + len(lens)), counts)
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, cu_seqlens[rows] + index * block_q


def _closing_windows(
    meta: AttnMetadata, token_rows: npt.NDArray[np.integer], length: int, stride: int
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Rows and ends of the windows that the prefill tokens close, none where length is 0.

    Those of decode rows are found on the device.
    """
    first = meta.num_decode_rows
    ends = meta.positions.numpy()[first:] + 1
    closes = (ends >= length) & (ends % max(stride, 1) == 0) & (length > 0)
    return token_rows[first:][closes], ends[closes]


def _score_chunks(
    meta: AttnMetadata,
    tile_starts: npt.NDArray[np.integer],
    cost: int,
    spec: NSASpec,
) -> list[ScoreChunk]:
    """Cut the tiles so that each chunk's score workspace stays under its bound.

    cost: bytes that a token needs for each score tile it sees.
    """
    positions = meta.positions.numpy()
    ends = np.append(tile_starts[1:], len(positions))
    tile_entries = score_tile_entries(spec.cmp_entries_per_page)
    # Positions grow inside a tile, so its last token sees most.
    visible = (positions[ends - 1] + 1) // spec.cmp_stride
    score_tiles = np.maximum(-(-visible // tile_entries), 1)
    is_dense = positions[ends - 1] + 1 < spec.dense_len
    chunks: list[ScoreChunk] = []
    first = 0
    while first < len(tile_starts):
        stop, most = first, 0
        while stop < len(tile_starts):
            most = max(most, int(score_tiles[stop]))
            tokens = int(ends[stop] - tile_starts[first])
            is_other = is_dense[stop] != is_dense[first]
            if stop > first and (is_other or cost * most * tokens > WORKSPACE_BYTES):
                break
            stop += 1
        used = int(score_tiles[first:stop].max())
        begin, end = int(tile_starts[first]), int(ends[stop - 1])
        chunks.append(
            ScoreChunk(slice(first, stop), begin, end - begin, used, bool(is_dense[first]))
        )
        first = stop
    return chunks
