"""What pages cost, and how many fit: plain arithmetic, the same for every device."""

from dataclasses import dataclass

# Window pages for prefix hits: one for so many main pages.
_PAGES_PER_WINDOW_HIT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCost:
    """What pages cost and how many one request needs; page_bytes is with all layers.

    fp8_page_bytes: a page's bytes with --kv-cache-dtype fp8; page_bytes when that is in use.
    swa_page_bytes, num_step_swa_pages: of window pages, what one costs and how many steps need (see
    `window_pages.num_step_pages`); 0 where the model has none.

    Numbers of pages include the null page.
    """

    page_bytes: int
    fp8_page_bytes: int
    page_size: int
    max_model_len: int
    swa_page_bytes: int = 0
    num_step_swa_pages: int = 0

    @property
    def pages_per_request(self) -> int:
        """Pages of a request of max_model_len tokens."""
        return -(-self.max_model_len // self.page_size)

    @property
    def step_swa_bytes(self) -> int:
        """Bytes of the window pages that there are however few main pages."""
        return self.num_step_swa_pages * self.swa_page_bytes

    def num_swa_pages(self, num_pages: int) -> int:
        """Return how many window pages go with `num_pages` main pages: a fixed part and a share."""
        if not self.num_step_swa_pages:
            return 0
        return self.num_step_swa_pages + num_pages // _PAGES_PER_WINDOW_HIT

    def bytes_of(self, num_pages: int) -> int:
        """Return what `num_pages` main pages cost, their window pages included."""
        return num_pages * self.page_bytes + self.num_swa_pages(num_pages) * self.swa_page_bytes

    def num_pages_in(self, memory: int) -> int:
        """Return the most main pages that `memory` bytes hold with their window pages."""
        room = max(0, memory - self.step_swa_bytes)
        each = _PAGES_PER_WINDOW_HIT * self.page_bytes + self.swa_page_bytes
        # The share is rounded down, so there may be room for a few more.
        count = _PAGES_PER_WINDOW_HIT * room // each
        while self.bytes_of(count + 1) <= memory:
            count += 1
        return count

    def describe(self, num_pages: int) -> str:
        """Return the pages and what one costs, for an error message."""
        text = f"{num_pages} pages of {self.page_bytes} bytes, the null page included"
        if self.num_step_swa_pages:
            count = self.num_swa_pages(num_pages)
            text += f", with {count} window pages of {self.swa_page_bytes} bytes"
        return text
