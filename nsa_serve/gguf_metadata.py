"""The header of a GGUF file: its key-values, and a cursor for what follows them.

A start that has two seconds for the tokenizer cannot wait for a reader that makes an array object
of each of a hundred thousand strings. This one walks the header once, checks every length against
the file before it believes it, and leaves the tensor data unread.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsa_serve.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_HEADER = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of key-values
U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")

_STRING_TYPE = 8
_ARRAY_TYPE = 9
# GGUF value type -> letter of the struct module.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}

# The shortest key-value: an empty key's length, a type, and a value of one byte.
_MIN_PAIR_BYTES = U64.size + U32.size + 1


def read_gguf_metadata(path: str | Path, *, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the key-values whose key starts with one of `keys`; all of them when it is None.

    Arrays become lists, strings str. Raises ModelError when the file cannot be read, is not GGUF
    version 2 or 3, or is truncated or damaged in its header.
    """
    with open_gguf(path) as header:
        return header.read_metadata(None if keys is None else tuple(keys))


@contextmanager
def open_gguf(path: str | Path) -> Iterator["GGUFHeader"]:
    """Map a GGUF file and give a cursor at its key-values. Raises ModelError as its reads do."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < _HEADER.size:
                raise ModelError(f"{path} is too short to be a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield GGUFHeader(data, str(path))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None


class GGUFHeader:
    """A cursor over the header: every read checks that the file is long enough first.

    path: for messages. size: bytes of the file. offset: of the next read. num_tensors: what the
    header announces.
    """

    def __init__(self, data: mmap.mmap, path: str) -> None:
        self._data = data
        self.path = path
        self.size = len(data)
        magic, version, self.num_tensors, self._num_pairs = _HEADER.unpack_from(data, 0)
        if magic != _MAGIC:
            raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}")
        if version not in _VERSIONS:
            raise ModelError(
                f"{path} is GGUF version {version} (or big-endian); "
                "versions 2 and 3, little-endian, are supported"
            )
        self.offset = _HEADER.size

    def read_metadata(self, prefixes: tuple[str, ...] | None) -> dict[str, Any]:
        """Read the key-values, to their end; keep those whose key starts with a prefix."""
        num_pairs = self._num_pairs
        self.require(num_pairs, _MIN_PAIR_BYTES, "key-values")
        metadata: dict[str, Any] = {}
        seen: set[str] = set()
        for _ in range(num_pairs):
            key = self.read_strings("a key", 1, wanted=True)[0]
            if key in seen:
                raise self.damaged(f"key {key!r} occurs twice")
            seen.add(key)
            wanted = prefixes is None or key.startswith(prefixes)
            value = self._value(key, self.read_number(U32, key), wanted=wanted)
            if wanted:
                metadata[key] = value
        return metadata

    def _value(self, key: str, value_type: int, *, wanted: bool) -> Any:
        if value_type == _STRING_TYPE:
            return self.read_strings(key, 1, wanted=wanted)[0]
        if value_type == _ARRAY_TYPE:
            return self._array(key, wanted=wanted)
        return self._scalars(key, value_type, 1, wanted=True)[0]

    def _array(self, key: str, *, wanted: bool) -> list[Any]:
        item_type = self.read_number(U32, key)
        count = self.read_number(U64, key)
        if item_type == _STRING_TYPE:
            self.require(count, U64.size, f"strings in {key!r}")
            return self.read_strings(key, count, wanted=wanted)
        if item_type == _ARRAY_TYPE:
            raise self.damaged(f"{key!r} is an array of arrays, which is not supported")
        return self._scalars(key, item_type, count, wanted=wanted)

    def _scalars(self, key: str, value_type: int, count: int, *, wanted: bool) -> list[Any]:
        if value_type not in _SCALARS:
            raise self.damaged(f"{key!r} has the unknown value type {value_type}")
        letter = _SCALARS[value_type]
        size = struct.calcsize("<" + letter)
        self.require(count, size, f"values in {key!r}")
        offset = self.offset
        self.offset += count * size
        if not wanted:
            return []
        return list(struct.unpack_from(f"<{count}{letter}", self._data, offset))

    def read_strings(self, key: str, count: int, *, wanted: bool) -> list[str]:
        """Read `count` strings: the hot loop, a hundred thousand turns for a large vocabulary.

        Unwanted ones are stepped over, and read as "".
        """
        data, size, offset = self._data, self.size, self.offset
        length_at: Callable[[mmap.mmap, int], tuple[int]] = U64.unpack_from
        strings: list[str] = []
        try:
            for _ in range(count):
                start = offset + U64.size
                # Past the end of the file this raises struct.error.
                offset = start + length_at(data, offset)[0]
                if offset > size:
                    raise self.damaged(f"a string of {key!r} is longer than what is left")
                strings.append(data[start:offset].decode() if wanted else "")
        except struct.error:
            raise self.damaged(f"it ends inside {key!r}") from None
        except UnicodeDecodeError:
            raise self.damaged(f"string {len(strings)} of {key!r} is not UTF-8") from None
        self.offset = offset
        return strings

    def read_number(self, number: struct.Struct, what: str) -> int:
        """Read one number, U32 or U64."""
        self.require(1, number.size, f"number in {what!r}")
        value: int = number.unpack_from(self._data, self.offset)[0]
        self.offset += number.size
        return value

    def require(self, count: int, item_bytes: int, what: str) -> None:
        """Raise ModelError unless `count` items of at least `item_bytes` are left."""
        left = self.size - self.offset
        if count * item_bytes > left:
            raise self.damaged(f"it announces {count} {what}, but only {left} bytes are left")

    def damaged(self, problem: str) -> ModelError:
        """Return the error that says what is wrong with the file."""
        return ModelError(f"{self.path} is damaged or truncated: {problem}")
