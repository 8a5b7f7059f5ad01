"""What a decode step finds on the device, after any history of steps before it."""

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_kernels.gpu.decode_inputs import decode_inputs
from nsa_serve import step_buffers
from nsa_serve.cuda_graph import least_at_least, page_buckets, row_buckets
from nsa_serve.request import Request, RequestStatus
from nsa_serve.scheduler_output import ScheduledRow
from nsa_serve.step_buffers import DecodeBuffers
from tests.engine.paged_model import make_request
from tests.kernels.gpu_util import DEVICE

MAX_ROWS, MAX_PAGES, PAGE_SIZE = 6, 500, 4


class Simulation:
    """Requests that come, grow, are preempted and go; each step's tensors are compared to them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.buffers = DecodeBuffers(max_num_rows=MAX_ROWS, max_num_pages=MAX_PAGES, device=DEVICE)
        self.last_tokens = torch.arange(1000, 1000 + MAX_ROWS, device=DEVICE)
        self.running: list[Request] = []
        self.num_arrivals = 0
        self.next_page = 1

    def grow(self, request: Request) -> None:
        needed = -(-(request.num_tokens + 1) // PAGE_SIZE)
        while len(request.pages) < needed:
            request.pages.append(self.next_page)
            self.next_page += 1

    def arrive(self) -> None:
        request = make_request(f"r{self.num_arrivals}", self.random.randint(1, 60))
        self.num_arrivals += 1
        self.grow(request)
        self.running.append(request)

    def disturb(self) -> None:
        for request in list(self.running):
            if self.random.random() < 0.1:
                request.status = RequestStatus.FINISHED
                self.running.remove(request)
            elif self.random.random() < 0.1:
                request.num_preemptions += 1
                request.pages = []
            # Several tokens at once, as when steps that ran without a graph came between.
            for _ in range(self.random.choice((1, 1, 1, 9))):
                request.append_token(self.random.randint(0, 99))
            self.grow(request)
        while len(self.running) < MAX_ROWS and self.random.random() < 0.5:
            self.arrive()
        self.random.shuffle(self.running)

    def step(self) -> None:
        present = [r for r in self.running if self.random.random() < 0.8]
        pending = {r.request_id: self.random.randrange(MAX_ROWS) for r in present[::2]}
        rows = []
        for request in present:
            start = request.num_tokens if request.request_id in pending else request.num_tokens - 1
            rows.append(ScheduledRow(request, start, 1, True, request.num_preemptions))
        ordered = self.buffers.fill(rows, pending)
        assert {id(row) for row in ordered} == {id(row) for row in rows}
        self.check(ordered, pending)

    def check(self, ordered: list[ScheduledRow], pending: dict[str, int]) -> None:
        buffers = self.buffers
        decode_inputs(
            buffers.packed,
            self.last_tokens,
            num_rows=MAX_ROWS,
            input_ids=buffers.input_ids,
            seq_lens=buffers.seq_lens,
            positions=buffers.positions,
            page_table=buffers.page_table,
        )
        for index, row in enumerate(ordered):
            request, count = row.request, len(row.request.pages)
            source = pending.get(request.request_id)
            token = request.token_ids[row.start] if source is None else 1000 + source
            assert int(buffers.input_ids[index]) == token
            assert int(buffers.seq_lens[index]) == row.start + 1
            assert int(buffers.positions[index]) == row.start
            assert buffers.page_table[index, :count].tolist() == request.pages
            assert list(buffers.pages_of(request)) == request.pages
        assert buffers.seq_lens[len(ordered) :].tolist() == [0] * (MAX_ROWS - len(ordered))
        assert not buffers.positions[len(ordered) :].any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_sent_pages", [1, 1100, 1 << 20])
def test_every_row_finds_its_tokens_and_pages(
    seed: int, max_sent_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows go one by one, two or three at once, or all at once."""
    monkeypatch.setattr(step_buffers, "_MAX_SENT_PAGES", max_sent_pages)
    simulation = Simulation(seed)
    for _ in range(60):
        simulation.disturb()
        simulation.step()


def test_a_request_keeps_its_row_and_sends_one_page() -> None:
    simulation = Simulation(0)
    for _ in range(3):
        simulation.arrive()
    rows = [ScheduledRow(r, r.num_tokens - 1, 1, True) for r in simulation.running]
    first = simulation.buffers.fill(rows, {})
    again = simulation.buffers.fill(rows[::-1], {})
    assert [row.request for row in again] == [row.request for row in first]
    assert simulation.buffers.packed[3, :3].tolist() == [-1, -1, -1]
    grown = rows[1].request
    grown.pages.append(77)
    index = [row.request for row in again].index(grown)
    simulation.buffers.fill(rows, {})
    assert int(simulation.buffers.packed[3, index]) == len(grown.pages) - 1
    assert int(simulation.buffers.packed[4, index]) == 77


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not function.is_view:
            self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_rows_of_a_step_are_sent_in_one_copy_and_nothing_is_allocated() -> None:
    """Thirty-two long requests begin to decode together; then each has its row."""
    buffers = DecodeBuffers(max_num_rows=32, max_num_pages=4100, device=DEVICE)
    requests = [make_request(f"r{number}", 5) for number in range(32)]
    for number, request in enumerate(requests):
        # Of many lengths, one of them a single page.
        request.pages = [*range(1 + number, 2 + number + 127 * number)]
    rows = [ScheduledRow(request, 4, 1, True) for request in requests]
    for request in requests:
        buffers.pages_of(request)
    with Operations() as first:
        buffers.fill(rows, {})
    assert first.counts == {"copy_": 2, "index_copy_": 1}
    for number, request in enumerate(requests):
        assert buffers.page_table[number, : len(request.pages)].tolist() == request.pages
    requests[7].pages.append(77)
    with Operations() as second:
        buffers.fill(rows, {})
    assert second.counts == {"copy_": 1}


def test_a_request_that_was_preempted_since_the_last_step_gets_its_new_pages() -> None:
    """Its prompt ran again in a step that is not told here; it has as many pages as before."""
    simulation = Simulation(0)
    for _ in range(3):
        simulation.arrive()
    requests = simulation.running
    rows = [ScheduledRow(request, request.num_tokens - 1, 1, True) for request in requests]
    simulation.buffers.fill(rows, {})
    requests[1].num_preemptions += 1
    requests[1].pages = [page + 100 for page in requests[1].pages]
    ordered = simulation.buffers.fill(rows, {})
    for index, row in enumerate(ordered):
        pages = row.request.pages
        assert simulation.buffers.page_table[index, : len(pages)].tolist() == pages
    assert simulation.buffers.packed[3, :3].tolist() == [-1, -1, -1]


def test_pages_of_a_step_that_was_taken_back_are_sent_anew() -> None:
    simulation = Simulation(0)
    simulation.arrive()
    request = simulation.running[0]
    row = ScheduledRow(request, request.num_tokens - 1, 1, True)
    simulation.buffers.fill([row], {})
    request.pages[-1] = 77
    simulation.buffers.forget()
    simulation.buffers.fill([row], {})
    count = len(request.pages)
    assert simulation.buffers.page_table[0, :count].tolist() == request.pages
    assert list(simulation.buffers.pages_of(request)) == request.pages


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 32, 33, 64])
def test_row_buckets_hold_every_batch_without_much_padding(most: int) -> None:
    buckets = row_buckets(most)
    assert buckets == sorted(set(buckets)) and buckets[-1] == most
    for count in range(1, most + 1):
        size = least_at_least(buckets, count)
        assert count <= size <= max(2 * count - 1, -(-count // 8) * 8)


@pytest.mark.parametrize(("most", "page_size"), [(1, 16), (4000, 64), (65_664, 16), (131_072, 64)])
def test_page_buckets_hold_every_context(most: int, page_size: int) -> None:
    buckets = page_buckets(most, page_size)
    assert buckets == sorted(set(buckets)) and buckets[-1] == -(-most // page_size)
    for context in (4096, 8192, 65_536):
        # What is generated after a prompt of a power of two does not need the next bucket.
        pages = [(context + extra) // page_size for extra in (0, 500)]
        if pages[1] <= buckets[-1]:
            assert len({least_at_least(buckets, count) for count in pages}) == 1
