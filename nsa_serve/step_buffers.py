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

from nsa_kernels.gpu.decode_inputs import (
    NUM_FIELDS,
    PAGE,
    PAGE_INDEX,
    SEQ_LEN,
    SOURCE,
    SWA_PAGE,
    TOKEN,
)
from nsa_serve.request import Request, RequestStatus
from nsa_serve.scheduler_output import ScheduledRow

# Steps whose host buffers may be in use at once; one is filled while another is copied.
_NUM_HOST_BUFFERS = 4
# The same of whole rows of pages, of which few steps have any, and how many pages go at once: more
# than 64 requests of 100 k tokens have.
_NUM_ROW_BUFFERS = 2
_MAX_SENT_PAGES = 1 << 20


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

    def send(self, target: Tensor, count: int | None = None) -> None:
        """Queue the copy, of the first `count` numbers of a flat buffer."""
        if count is None:
            target.copy_(self.tensor, non_blocking=True)
        else:
            target[:count].copy_(self.tensor[:count], non_blocking=True)
        if self.event is not None:
            self.event.record()


class _RowSender:
    """Sends whole rows of a page table [Rmax, Pmax], all of a step in one copy and one scatter.

    Packed: the n rows' places as int64, then their pages as int32 [n, W], W those of the longest.
    """

    def __init__(self, page_table: Tensor) -> None:
        self._page_table = page_table
        max_num_rows, max_num_pages = page_table.shape
        most = max(min(max_num_rows * max_num_pages, _MAX_SENT_PAGES), max_num_pages)
        shape = (2 * max_num_rows + most,)
        self._max_num_sent = most
        self._device = torch.zeros(shape, dtype=torch.int32, device=page_table.device)
        self._host = [_HostBuffer(shape, page_table.device) for _ in range(_NUM_ROW_BUFFERS)]
        self._num_sent = 0

    def send(self, rows: Sequence[tuple[int, NDArray[np.int32]]]) -> None:
        """Queue the copies of rows (place in the table, pages)."""
        width = max((len(pages) for _, pages in rows), default=0)
        if width == 0:
            return
        most = self._max_num_sent // width
        for start in range(0, len(rows), most):
            self._send(rows[start : start + most], width)

    def _send(self, rows: Sequence[tuple[int, NDArray[np.int32]]], width: int) -> None:
        count = len(rows)
        num_words = count * (2 + width)
        buffer = self._host[self._num_sent % _NUM_ROW_BUFFERS]
        self._num_sent += 1
        buffer.wait()
        buffer.array[: 2 * count].view(np.int64)[:] = [place for place, _ in rows]
        packed = buffer.array[2 * count : num_words].reshape(count, width)
        for line, (_, pages) in zip(packed, rows, strict=True):
            line[: len(pages)] = pages
            line[len(pages) :] = 0
        buffer.send(self._device, num_words)
        places = self._device[: 2 * count].view(torch.int64)
        lines = self._device[2 * count : num_words].view(count, width)
        self._page_table[:, :width].index_copy_(0, places, lines)


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
    num_pages: of the longest row of the last step.
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
        # The requests of the last step, as often as each was preempted, and their order in the
        # page table: most steps have the same.
        self._requests: list[Request] = []
        self._counts: list[int] = []
        self._order: list[int] = []
        self.num_pages = 0
        self._row_sender = _RowSender(self.page_table)
        self._swa_row_sender = None
        if self.swa_page_table is not None:
            self._swa_row_sender = _RowSender(self.swa_page_table)
        self._whole_rows: list[int] = []
        shape = (NUM_FIELDS, max_num_rows)
        self._host = [_HostBuffer(shape, device) for _ in range(_NUM_HOST_BUFFERS)]
        self._num_steps = 0

    def pages_of(self, request: Request) -> Sequence[int]:
        """Return the pages of a request as an array, which a batch is laid out from faster."""
        return cast("Sequence[int]", self._page_rows.get(request))

    def forget(self) -> None:
        """Forget whose rows and pages the device has; the next step sends all of them."""
        self._slots.clear()
        self._requests, self._counts, self._order = [], [], []
        self._whole_rows.clear()
        self._page_rows = PageRows(len(self.seq_lens))

    def fill(self, rows: Sequence[ScheduledRow], sources: dict[str, int]) -> list[ScheduledRow]:
        """Send a step of decode rows; return them in the order of the page table's rows.

        sources: by request id, where among the last sampled tokens a pending one is.
        """
        ordered = self._assign(rows)
        buffer = self._host[self._num_steps % _NUM_HOST_BUFFERS]
        self._num_steps += 1
        buffer.wait()
        array, count = buffer.array, len(ordered)
        # Rows beyond are padding: no tokens, and nothing to write to the page table.
        array[:, count:] = 0
        array[PAGE_INDEX] = -1
        array[SEQ_LEN, :count] = [row.start + 1 for row in ordered]
        array[TOKEN, :count], array[SOURCE, :count] = _tokens(ordered, sources)
        longest = 0
        for index, slot in enumerate(self._slots):
            num_pages = len(slot.request.pages)
            if num_pages > longest:
                longest = num_pages
            if slot.num_pages != num_pages:
                array[PAGE_INDEX, index], array[PAGE, index] = self._new_page(index)
                if self._swa_row_sender is not None and array[PAGE_INDEX, index] >= 0:
                    # A request has as many window pages as pages, and gets both at once.
                    array[SWA_PAGE, index] = slot.request.swa_pages[-1]
        self.num_pages = longest
        if self._whole_rows:
            self._send_whole_rows()
        buffer.send(self.packed)
        return ordered

    def _send_whole_rows(self) -> None:
        requests = [(place, self._slots[place].request) for place in self._whole_rows]
        self._row_sender.send([(place, self._page_rows.get(item)) for place, item in requests])
        if self._swa_row_sender is not None:
            self._swa_row_sender.send(
                [(place, np.array(item.swa_pages, np.int32)) for place, item in requests]
            )
        self._whole_rows.clear()

    def _assign(self, rows: Sequence[ScheduledRow]) -> list[ScheduledRow]:
        """Give each request a row, the one it had if it had one."""
        requests = [row.request for row in rows]
        counts = [request.num_preemptions for request in requests]
        if requests != self._requests or counts != self._counts:
            self._order = self._reassign(requests)
            self._requests, self._counts = requests, counts
        return [rows[index] for index in self._order]

    def _reassign(self, requests: Sequence[Request]) -> list[int]:
        """Return which of the requests has each row of the page table from now on."""
        index_of = {request.request_id: index for index, request in enumerate(requests)}
        slots = self._slots
        place = 0
        while place < len(slots):
            slot = slots[place]
            index = index_of.get(slot.request.request_id)
            if (
                index is not None
                and requests[index] is slot.request
                and slot.request.num_preemptions == slot.num_preemptions
            ):
                place += 1
                continue
            last = slots.pop()
            if place < len(slots):
                last.num_pages = 0
                slots[place] = last
        if len(slots) < len(requests):
            seated = {slot.request.request_id for slot in slots}
            slots += [_Slot(request) for request in requests if request.request_id not in seated]
        return [index_of[slot.request.request_id] for slot in slots]

    def _new_page(self, place: int) -> tuple[int, int]:
        """Return the one page that the device does not know of, its index and itself.

        Where there are more, the whole row is sent, and the index is -1.
        """
        slot = self._slots[place]
        pages = slot.request.pages
        num_new = len(pages) - slot.num_pages
        slot.num_pages = len(pages)
        if num_new == 1 and len(pages) > 1:
            return len(pages) - 1, pages[-1]
        self._whole_rows.append(place)
        return -1, 0


def _tokens(rows: Sequence[ScheduledRow], sources: dict[str, int]) -> tuple[list[int], list[int]]:
    """Return the token of each row, -1 where it is pending, and then its source."""
    tokens, source_rows = [], []
    for row in rows:
        request, start = row.request, row.start
        if start < len(request.token_ids):
            tokens.append(request.token_ids[start])
            source_rows.append(0)
        else:
            tokens.append(-1)
            source_rows.append(sources[request.request_id])
    return tokens, source_rows
