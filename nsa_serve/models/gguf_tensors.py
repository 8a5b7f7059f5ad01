"""Names, shapes, types and places of the tensors in a GGUF file. No tensor is read, no torch.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from nsa_serve.errors import ModelError
from nsa_serve.gguf_metadata import _HEADER, _U32, _U64, _MetadataReader

_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
# The shortest entry: an empty name, no dimension, a type and an offset.
_MIN_ENTRY_BYTES = _U64.size + _U32.size + _U32.size + _U64.size


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
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < _HEADER.size:
                raise ModelError(f"{path} is too short to be a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _TensorReader(data, str(path)).tensors()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None


class _TensorReader(_MetadataReader):
    """Goes on where the key-values end."""

    def tensors(self) -> dict[str, GGUFTensor]:
        alignment = self.read((_ALIGNMENT_KEY,)).get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"{_ALIGNMENT_KEY} is {alignment!r}")
        num_tensors: int = _HEADER.unpack_from(self._data, 0)[2]
        self._require(num_tensors, _MIN_ENTRY_BYTES, "tensors")
        entries = [self._entry() for _ in range(num_tensors)]
        start = -(-self._offset // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, number, offset in entries:
            if name in tensors:
                raise self._damaged(f"tensor {name!r} occurs twice")
            tensors[name] = self._tensor(name, shape, number, start + offset)
        return tensors

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._read_strings("a tensor name", 1, wanted=True)[0]
        num_dims = self._number(_U32, name)
        if num_dims > _MAX_DIMS:
            raise self._damaged(f"tensor {name!r} has {num_dims} dimensions")
        # GGUF lists the contiguous axis first.
        shape = tuple(self._number(_U64, name) for _ in range(num_dims))[::-1]
        return name, shape, self._number(_U32, name), self._number(_U64, name)

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> GGUFTensor:
        try:
            quant_type = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[quant_type]
        except (ValueError, KeyError):
            raise ModelError(f"{self._path}: {name} has the unknown tensor type {number}") from None
        row = shape[-1] if shape else 1
        if row % block:
            raise self._damaged(f"rows of {name!r} ({row}) are no multiple of {block}")
        num_bytes = math.prod(shape) // block * block_bytes
        if offset + num_bytes > self._size:
            raise self._damaged(f"tensor {name!r} does not lie within the file")
        return GGUFTensor(shape, quant_type, offset, num_bytes)
