"""Safetensors on their way to a device: threads read file ranges into pinned staging buffers, and
each buffer is copied, converted and put into its final tensor by a stream of its own.

So host memory is the staging buffers whatever the model's size, and reading, copying and converting
overlap. Files are read, not mapped: one that shrinks meanwhile is an error, not a signal.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nsa_serve.errors import ModelError
from nsa_serve.models.device_weights import DeviceWeights
from nsa_serve.models.safetensors_files import StoredWeight

NUM_READERS = 8
"""Threads, and staging buffers. A thread copies a few GB/s out of the page cache."""

STAGING_BYTES = 32 << 20
"""Of one staging buffer. A row of a weight that is longer makes them longer."""

# Pinned memory costs time by its size, which a small model does not repay.
_LEAST_STAGING_BYTES = 1 << 20

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class _Piece:
    """Whole rows of one weight: what one staging buffer takes at once."""

    name: str
    item: StoredWeight
    first_row: int
    num_rows: int
    offset: int
    num_bytes: int


def stream_weights(
    stored: Mapping[str, StoredWeight],
    target: DeviceWeights,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    num_readers: int = NUM_READERS,
    staging_bytes: int = STAGING_BYTES,
) -> None:
    """Read every weight of `stored`, by canonical name, into `target`.

    `on_progress(done, total)` counts bytes of the checkpoint, in the calling thread. The writes
    are complete when the device is synchronized, as `DeviceWeights.finish` does.

    Raises ModelError for a file that ends early or cannot be read; what else a reader raises is
    raised here.
    """
    total = sum(item.num_bytes for item in stored.values())
    staging_bytes = min(staging_bytes, max(total // num_readers, _LEAST_STAGING_BYTES))
    longest = max((_row_bytes(item) for item in stored.values()), default=0)
    staging_bytes = max(staging_bytes, longest)
    # In the order of the files, so that a disk reads ahead.
    ordered = sorted(stored.items(), key=lambda pair: (str(pair[1].path), pair[1].offset))
    pieces: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
    num_pieces = 0
    for name, item in ordered:
        for piece in _cut(name, item, staging_bytes):
            pieces.put(piece)
            num_pieces += 1
    readers = _Readers(pieces, target, staging_bytes)
    try:
        readers.start(min(num_readers, num_pieces))
        done = 0
        for _ in range(num_pieces):
            done += readers.next_result()
            if on_progress is not None:
                on_progress(done, total)
    finally:
        readers.stop()


def _row_bytes(item: StoredWeight) -> int:
    return item.num_bytes // max(1, item.shape[0]) if item.shape else item.num_bytes


def _cut(name: str, item: StoredWeight, staging_bytes: int) -> Iterator[_Piece]:
    """Cut a weight into whole rows that fit into a buffer."""
    row_bytes = _row_bytes(item)
    step = max(1, staging_bytes // max(1, row_bytes))
    for first_row in range(0, item.shape[0], step):
        num_rows = min(step, item.shape[0] - first_row)
        offset = item.offset + first_row * row_bytes
        yield _Piece(name, item, first_row, num_rows, offset, num_rows * row_bytes)


class _Readers:
    """Threads that read pieces; each has a staging buffer and, on a GPU, a stream."""

    def __init__(
        self, pieces: "queue.SimpleQueue[_Piece]", target: DeviceWeights, staging_bytes: int
    ) -> None:
        self._pieces = pieces
        self._target = target
        self._staging_bytes = staging_bytes
        # Bytes of a piece that is done, or why a reader stopped; every piece taken gives one.
        self._results: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self._is_stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, num_readers: int) -> None:
        """Start the threads."""
        if self._target.device.type == "cuda":
            # Readers' streams must not write before the tensors' allocation and zeroing is over.
            torch.cuda.synchronize(self._target.device)
        for index in range(num_readers):
            thread = threading.Thread(target=self._run, name=f"weights-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def next_result(self) -> int:
        """Wait for the next piece; return its bytes, or raise what went wrong with it."""
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> None:
        """Let the threads end after the piece that each has."""
        self._is_stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._read_all()
        except BaseException as error:
            self._results.put(error)

    def _read_all(self) -> None:
        device = self._target.device
        is_cuda = device.type == "cuda"
        stream = torch.cuda.Stream(device) if is_cuda else None
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            staging = torch.empty(self._staging_bytes, dtype=torch.uint8, pin_memory=is_cuda)
            while not self._is_stopped.is_set():
                try:
                    piece = self._pieces.get_nowait()
                except queue.Empty:
                    break
                if stream is not None:
                    # The buffer still holds the last piece until its copy is over.
                    stream.synchronize()
                self._read(piece, staging)
                self._results.put(piece.num_bytes)
        if stream is not None:
            # The buffer may be freed only after its last copy.
            stream.synchronize()

    def _read(self, piece: _Piece, staging: Tensor) -> None:
        item = piece.item
        _read_range(item.path, piece.offset, staging[: piece.num_bytes], piece.name)
        rows = staging[: piece.num_bytes].view(_DTYPES[item.dtype])
        rows = rows.view(piece.num_rows, *item.shape[1:])
        # Copied as it is: converting is the device's work.
        on_device = rows.to(self._target.device, non_blocking=True)
        self._target.write(piece.name, piece.first_row, on_device)


def _read_range(path: Path, offset: int, buffer: Tensor, name: str) -> None:
    """Fill a uint8 buffer from a file. Raises ModelError when the file cannot give as much."""
    view = buffer.numpy().data
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(file, [view[done:]], offset + done)
                if count == 0:
                    raise ModelError(f"{path} ends inside {name}; complete the download")
                done += count
        finally:
            os.close(file)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
