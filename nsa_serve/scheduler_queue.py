"""Requests as the scheduler holds them, and the queue of those that wait."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from nsa_serve.request import Request

Policy = Literal["fcfs", "priority"]


@dataclass(slots=True, eq=False)
class Entry:
    """A request and what only the scheduler knows of it.

    max_tokens: its length, prompt and output together, at which it ends at the latest.
    num_in_flight_tokens: of the rows that are not updated yet. num_pending_tokens: those of these
    rows that sample, each of which will add a token to the known ones.
    """

    request: Request
    arrival: int
    max_tokens: int
    num_in_flight_tokens: int = 0
    num_pending_tokens: int = 0

    @property
    def next_start(self) -> int:
        """Tokens that ran or are in flight: where the next row starts."""
        return self.request.num_computed_tokens + self.num_in_flight_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, those included that are yet to be told."""
        return len(self.request.token_ids) + self.num_pending_tokens

    @property
    def num_remaining(self) -> int:
        """Tokens, known or pending, that are in no row yet and have to be."""
        num_pending = self.num_pending_tokens
        num_tokens = len(self.request.token_ids) + num_pending
        if num_pending and num_tokens >= self.max_tokens:
            # The last token of a request is not run: nothing follows it.
            return 0
        return num_tokens - self.request.num_computed_tokens - self.num_in_flight_tokens


class WaitingQueue:
    """Entries in the order of service, so a preempted one is back before those that came later.

    policy: "fcfs" serves by arrival, "priority" by (`Request.priority`, arrival), lowest first.
    Raises ValueError when it is neither.
    """

    def __init__(self, policy: Policy) -> None:
        if policy not in ("fcfs", "priority"):
            raise ValueError(f"policy must be 'fcfs' or 'priority', got {policy!r}")
        self.policy = policy
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def key(self, entry: Entry) -> tuple[int, int]:
        """Return the rank of an entry, waiting or running; lower is served first."""
        priority = entry.request.priority if self.policy == "priority" else 0
        return priority, entry.arrival

    @property
    def first(self) -> Entry:
        """The entry to be served next. The queue must not be empty."""
        return self._entries[0]

    def add(self, entry: Entry) -> None:
        """Put an entry in its place."""
        insort(self._entries, entry, key=self.key)

    def remove(self, entry: Entry) -> None:
        """Take an entry out, wherever it stands."""
        index = bisect_left(self._entries, self.key(entry), key=self.key)
        assert self._entries[index] is entry, f"{entry.request.request_id} is not in the queue"
        del self._entries[index]
