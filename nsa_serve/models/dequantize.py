"""GGML tensor types to floating point, bit for bit what `gguf.dequantize` gives.

The types of the common files are a few operations in torch over pieces that stay in the
processor's cache; the rest goes through the `gguf` package. Layouts: ggml's block_q4_0,
block_q4_1, block_q8_0.
"""

from collections.abc import Callable

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize

from nsa_serve.errors import ModelError

CHUNK_BLOCKS = 8192
"""Blocks of 32 values that are dequantized at a time: 1 MiB of float32."""

_BLOCK = 32
_HALF = _BLOCK // 2
_PLAIN = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def dequantize(
    raw: torch.Tensor,
    quant_type: GGMLQuantizationType,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the values of one tensor, computed in float32 and rounded to `dtype`.

    raw: uint8 [num_bytes]. Raises ModelError for a type that the `gguf` package does not know how
    to dequantize.
    """
    if quant_type in _PLAIN:
        return raw.view(_PLAIN[quant_type]).view(shape).to(dtype)
    dequantize_blocks = _TORCH_TYPES.get(quant_type)
    if dequantize_blocks is None:
        return _through_gguf(raw, quant_type, shape).to(dtype)
    blocks = raw.view(-1, GGML_QUANT_SIZES[quant_type][1])
    values = torch.empty((blocks.shape[0], _BLOCK), dtype=dtype)
    scratch = torch.empty((min(CHUNK_BLOCKS, blocks.shape[0]), _BLOCK), dtype=torch.float32)
    for start in range(0, blocks.shape[0], CHUNK_BLOCKS):
        chunk = blocks[start : start + CHUNK_BLOCKS]
        out = scratch[: chunk.shape[0]]
        dequantize_blocks(chunk, out)
        values[start : start + CHUNK_BLOCKS] = out
    return values.view(shape)


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """fp16 scale, 32 nibbles: scale * (nibble - 8)."""
    _unpack_nibbles(blocks[:, 2:], out)
    out.sub_(8.0).mul_(_halves(blocks, 0))


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """fp16 scale, fp16 minimum, 32 nibbles: scale * nibble + minimum."""
    _unpack_nibbles(blocks[:, 4:], out)
    out.mul_(_halves(blocks, 0)).add_(_halves(blocks, 2))


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """fp16 scale, 32 int8: scale * value."""
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_halves(blocks, 0))


_TORCH_TYPES: dict[GGMLQuantizationType, Callable[[torch.Tensor, torch.Tensor], None]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
}


def _unpack_nibbles(packed: torch.Tensor, out: torch.Tensor) -> None:
    """Low nibbles are the first half of a block, high nibbles the second. [N, 16] -> [N, 32]."""
    out[:, :_HALF] = packed & 15
    out[:, _HALF:] = packed >> 4


def _halves(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The fp16 at byte `offset` of each block, as float32 [N, 1]."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _through_gguf(
    raw: torch.Tensor, quant_type: GGMLQuantizationType, shape: tuple[int, ...]
) -> torch.Tensor:
    rows = raw.numpy().reshape(*shape[:-1], -1)
    try:
        values = gguf_dequantize(rows, quant_type)
    except NotImplementedError:
        raise ModelError(f"GGUF tensor type {quant_type.name} is not supported") from None
    return torch.from_numpy(np.ascontiguousarray(values)).view(shape)
