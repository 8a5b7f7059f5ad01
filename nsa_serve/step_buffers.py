"""What a decode step tells the GPU: static tensors that CUDA graphs read, and how they are filled.

A request keeps its row of the page table from step to step, so that a step sends a few integers a
row. Rows are dense: when a request leaves, the last one takes its row.

Rmax rows, Pmax pages of the longest request.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nsa_kernels.gpu.decode_inputs import NUM_FIELDS, PAGE_INDEX, SWA_PAGE
from nsa_serve.request import Request, RequestStatus
from nsa_serve.scheduler_output import ScheduledRow

# Steps whose host buffers may be in use at once; one is filled while another is copied.
_NUM_HOST_BUFFERS = 4


class PageRows:
    """The pages of requests as arrays, grown as the requests grow."""

    def __init__(self, max_num_requests: int) -> None:
        self._max_num_requests = max_num_requests
        # By request id: the request, its preemptions, its pages and how many of them are filled in.
        self._rows: dict[str, tuple[Request, int, NDArray[np.int32], int]] = {}

    def get(self, request: Request) -> NDArray[np.int32]:
        """Return the pages of a request, int32 [pages]."""
        pages = request.pages
        known = self._rows.get(request.request_id)
        if known is None or known[0] is not request or known[1] != request.num_preemptions:
            if len(self._rows) > 2 * self._max_num_requests:
                self._forget_finished()
            known = request, request.num_preemptions, np.zeros(len(pages), np.int32), 0
        array, count = known[2], known[3]
        if count < len(pages):
            if len(pages) > len(array):
                array = np.concatenate((array, np.zeros(len(pages), np.int32)))
            array[count : len(pages)] = pages[count:]
            self._rows[request.request_id] = request, request.num_preemptions, array, len(pages)
        return array[: len(pages)]

    def _forget_finished(self) -> None:
        self._rows = {
            name: row
            for name, row in self._rows.items()
            if row[0].status is not RequestStatus.FINISHED
        }


class _HostBuffer:
    """Pinned memory, and the event after which it may be written again."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.tensor = torch.zeros(shape, dtype=torch.int32, pin_memory=is_cuda)
        self.array: NDArray[np.int32] = self.tensor.numpy()
        self.event = torch.cuda.Event() if is_cuda else None

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def send(self, target: Tensor) -> None:
        target.copy_(self.tensor, non_blocking=True)
        if self.event is not None:
            self.event.record()


class _Slot:
    """A row of the page table: whose it is, and how many of its pages are there."""

    __slots__ = ("num_pages", "num_preemptions", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.num_preemptions = request.num_preemptions
        self.num_pages = 0


class DecodeBuffers:
    """Static tensors of decode steps, on the device.

    packed: [6, Rmax] int32, what `decode_inputs` spreads out. input_ids: [Rmax] int64. seq_lens,
    positions: [Rmax] int32. page_table: [Rmax, Pmax] int32. swa_page_table: the same of window
    pages, None without; a page that its row has passed may stand there yet, and is not read.
    """

    def __init__(
        self,
        *,
        max_num_rows: int,
        max_num_pages: int,
        device: torch.device,
        has_swa_pages: bool = False,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.packed = zeros(NUM_FIELDS, max_num_rows)
        self.input_ids = zeros(max_num_rows, dtype=torch.int64)
        self.seq_lens = zeros(max_num_rows)
        self.positions = zeros(max_num_rows)
        self.page_table = zeros(max_num_rows, max_num_pages)
        self.swa_page_table = zeros(max_num_rows, max_num_pages) if has_swa_pages else None
        self._page_rows = PageRows(max_num_rows)
        self._slots: list[_Slot] = []
        shape = (NUM_FIELDS, max_num_rows)
        self._host = [_HostBuffer(shape, device) for _ in range(_NUM_HOST_BUFFERS)]
        self._num_steps = 0

    def pages_of(self, request: Request) -> Sequence[int]:
        """Return the pages of a request as an array, which a batch is laid out from faster."""
        return cast("Sequence[int]", self._page_rows.get(request))

    def forget(self) -> None:
        """Forget whose rows and pages the device has; the next step sends all of them."""
        self._slots.clear()
        self._page_rows = PageRows(len(self.seq_lens))

    def fill(self, rows: Sequence[ScheduledRow], sources: dict[str, int]) -> list[ScheduledRow]:
        """Send a step of decode rows; return them in the order of the page table's rows.

        sources: by request id, where among the last sampled tokens a pending one is.
        """
        ordered = self._assign(rows)
        buffer = self._host[self._num_steps % _NUM_HOST_BUFFERS]
        self._num_steps += 1
        buffer.wait()
        fields: tuple[list[int], ...] = ([], [], [], [], [])
        seq_lens, tokens, source_rows, page_indices, pages = fields
        for index, row in enumerate(ordered):
            request, start = row.request, row.start
            is_known = start < len(request.token_ids)
            seq_lens.append(start + 1)
            tokens.append(request.token_ids[start] if is_known else -1)
            source_rows.append(0 if is_known else sources[request.request_id])
            page_index = self._new_page(index)
            page_indices.append(page_index)
            pages.append(0 if page_index < 0 else request.pages[page_index])
        count = len(ordered)
        buffer.array[: len(fields), :count] = fields
        # Rows beyond are padding: no tokens, and nothing to write to the page table.
        buffer.array[:, count:] = 0
        buffer.array[3, count:] = -1
        if self.swa_page_table is not None:
            self._add_swa_pages(buffer.array)
        buffer.send(self.packed)
        return ordered

    def _add_swa_pages(self, array: NDArray[np.int32]) -> None:
        """Send the window page that comes with each new page; a request has as many of both."""
        for index in np.flatnonzero(array[PAGE_INDEX] >= 0).tolist():
            request = self._slots[index].request
            array[SWA_PAGE, index] = request.swa_pages[array[PAGE_INDEX, index]]

    def _assign(self, rows: Sequence[ScheduledRow]) -> list[ScheduledRow]:
        """Give each request a row, the one it had if it had one."""
        by_id = {row.request.request_id: row for row in rows}
        slots = self._slots
        index = 0
        while index < len(slots):
            slot = slots[index]
            row = by_id.get(slot.request.request_id)
            if (
                row is not None
                and row.request is slot.request
                and slot.request.num_preemptions == slot.num_preemptions
            ):
                index += 1
                continue
            last = slots.pop()
            if index < len(slots):
                last.num_pages = 0
                slots[index] = last
        if len(slots) < len(rows):
            seated = {slot.request.request_id for slot in slots}
            slots += [_Slot(row.request) for row in rows if row.request.request_id not in seated]
        return [by_id[slot.request.request_id] for slot in slots]

    def _new_page(self, index: int) -> int:
        """Return the index of the one page that the device does not know of; -1 when there is none.

        Where there are more, the whole row is sent at once.
        """
        slot = self._slots[index]
        count = len(slot.request.pages)
        num_new = count - slot.num_pages
        slot.num_pages = count
        if num_new == 1 and count > 1:
            return count - 1
        if num_new:
            pages = torch.from_numpy(self._page_rows.get(slot.request).copy())
            if self.page_table.is_cuda:
                # The allocator of pinned memory waits for the copy before it gives this out again.
                pages = pages.pin_memory()
            self.page_table[index, :count].copy_(pages, non_blocking=True)
            if self.swa_page_table is not None:
                swa_pages = torch.tensor(slot.request.swa_pages, dtype=torch.int32)
                if self.swa_page_table.is_cuda:
                    swa_pages = swa_pages.pin_memory()
                self.swa_page_table[index, :count].copy_(swa_pages, non_blocking=True)
        return -1
