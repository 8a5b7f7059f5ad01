"""Names, shapes, types and places of the tensors in a GGUF file. No tensor is read, no torch.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import math
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from nsa_serve.errors import ModelError
from nsa_serve.gguf_metadata import U32, U64, GGUFHeader, open_gguf

_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
# The shortest entry: an empty name, no dimension, a type and an offset.
_MIN_ENTRY_BYTES = U64.size + U32.size + U32.size + U64.size


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: shape with the contiguous axis last, and its bytes in the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int


def read_gguf_tensors(path: Path) -> dict[str, GGUFTensor]:
    """Return the tensors of a GGUF file by name.

    Raises ModelError when the file cannot be read or its header is damaged, and for a tensor that
    is of an unknown type or does not lie within the file.
    """
    with open_gguf(path) as header:
        alignment = header.read_metadata((_ALIGNMENT_KEY,)).get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise header.damaged(f"{_ALIGNMENT_KEY} is {alignment!r}")
        header.require(header.num_tensors, _MIN_ENTRY_BYTES, "tensors")
        entries = [_read_entry(header) for _ in range(header.num_tensors)]
        start = -(-header.offset // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, number, offset in entries:
            if name in tensors:
                raise header.damaged(f"tensor {name!r} occurs twice")
            tensors[name] = _make_tensor(header, name, shape, number, start + offset)
        return tensors


def _read_entry(header: GGUFHeader) -> tuple[str, tuple[int, ...], int, int]:
    """Read (name, shape, type number, offset from the start of the data)."""
    name = header.read_strings("a tensor name", 1, wanted=True)[0]
    num_dims = header.read_number(U32, name)
    if num_dims > _MAX_DIMS:
        raise header.damaged(f"tensor {name!r} has {num_dims} dimensions")
    # GGUF lists the contiguous axis first.
    shape = tuple(header.read_number(U64, name) for _ in range(num_dims))[::-1]
    return name, shape, header.read_number(U32, name), header.read_number(U64, name)


def _make_tensor(
    header: GGUFHeader, name: str, shape: tuple[int, ...], number: int, offset: int
) -> GGUFTensor:
    try:
        quant_type = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[quant_type]
    except (ValueError, KeyError):
        raise ModelError(f"{header.path}: {name} has the unknown tensor type {number}") from None
    row = shape[-1] if shape else 1
    if row % block:
        raise header.damaged(f"rows of {name!r} ({row}) are no multiple of {block}")
    num_bytes = math.prod(shape) // block * block_bytes
    if offset + num_bytes > header.size:
        raise header.damaged(f"tensor {name!r} does not lie within the file")
    return GGUFTensor(shape, quant_type, offset, num_bytes)
