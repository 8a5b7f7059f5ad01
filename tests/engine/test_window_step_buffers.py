"""The table of window pages on the device: whatever a row may still read stands there."""

import pytest
import torch

from nsa_kernels.gpu.decode_inputs import decode_inputs
from nsa_serve.page_pool import NULL_PAGE
from nsa_serve.request import Request
from nsa_serve.scheduler_output import ScheduledRow
from nsa_serve.step_buffers import DecodeBuffers
from tests.engine.test_step_buffers import MAX_PAGES, MAX_ROWS, Simulation
from tests.kernels.gpu_util import DEVICE


class WindowSimulation(Simulation):
    """Requests that list as many window pages as pages, and pass them from the front."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.buffers = DecodeBuffers(
            max_num_rows=MAX_ROWS, max_num_pages=MAX_PAGES, device=DEVICE, has_swa_pages=True
        )
        self.num_compared = 0

    def grow(self, request: Request) -> None:
        super().grow(request)
        if not request.pages or len(request.swa_pages) > len(request.pages):
            request.swa_pages = []
        for index in range(len(request.swa_pages), len(request.pages)):
            # A request that found a prefix begins with pages that it has passed.
            is_passed = not any(request.swa_pages) and index < len(request.pages) - 2
            page = NULL_PAGE if is_passed and self.random.random() < 0.5 else self.next_page
            self.next_page += 1
            request.swa_pages.append(page)
        num_passed = self.random.randrange(len(request.swa_pages))
        request.swa_pages[:num_passed] = [NULL_PAGE] * num_passed

    def check(self, ordered: list[ScheduledRow], pending: dict[str, int]) -> None:
        super().check(ordered, pending)
        buffers = self.buffers
        assert buffers.swa_page_table is not None
        decode_inputs(
            buffers.packed,
            self.last_tokens,
            num_rows=MAX_ROWS,
            input_ids=buffers.input_ids,
            seq_lens=buffers.seq_lens,
            positions=buffers.positions,
            page_table=buffers.page_table,
            swa_page_table=buffers.swa_page_table,
        )
        for index, row in enumerate(ordered):
            listed = torch.tensor(row.request.swa_pages, dtype=torch.int32)
            found = buffers.swa_page_table[index, : len(listed)].cpu()
            held = listed != NULL_PAGE
            assert torch.equal(found[held], listed[held])
            self.num_compared += int(held.sum())


@pytest.mark.parametrize("seed", range(4))
def test_every_row_finds_the_window_pages_that_it_has(seed: int) -> None:
    simulation = WindowSimulation(seed)
    num_steps = 60
    for _ in range(num_steps):
        simulation.disturb()
        simulation.step()
    assert simulation.num_compared > num_steps, "hardly any page was compared"


def test_a_step_sends_a_window_page_with_each_page() -> None:
    simulation = WindowSimulation(0)
    for _ in range(3):
        simulation.arrive()
    rows = [ScheduledRow(r, r.num_tokens - 1, 1, True) for r in simulation.running]
    ordered = simulation.buffers.fill(rows, {})
    grown = rows[1].request
    grown.pages.append(77)
    grown.swa_pages.append(99)
    index = [row.request for row in ordered].index(grown)
    simulation.buffers.fill(rows, {})
    assert simulation.buffers.packed[3:, index].tolist() == [len(grown.pages) - 1, 77, 99]
    simulation.buffers.fill(rows, {})
    assert simulation.buffers.packed[3].eq(-1).all()


def test_a_model_without_window_pages_has_no_table() -> None:
    assert Simulation(0).buffers.swa_page_table is None
