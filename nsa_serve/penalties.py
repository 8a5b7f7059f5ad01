"""Repetition, presence and frequency penalties, kept up to date from step to step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_serve.request import Request, SamplingParams


class Penalties:
    """Penalises the logits of a batch; remembers what each of its requests has generated."""

    def __init__(self) -> None:
        self._states: dict[str, _PenaltyState] = {}

    def apply(self, logits: Tensor, requests: Sequence[Request]) -> None:
        """Change logits [R, V] in place, row i for `requests[i]`."""
        states: dict[str, _PenaltyState] = {}
        for row, request in enumerate(requests):
            if not has_penalties(request.params):
                continue
            state = self._states.get(request.request_id)
            if state is None or state.request is not request:
                state = _PenaltyState(request, logits.device)
            states[request.request_id] = state
            state.apply(logits[row])
        # States of requests that left the batch go with the old dict.
        self._states = states


def has_penalties(params: SamplingParams) -> bool:
    """Return whether any of the three is on."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


class _PenaltyState:
    """The distinct tokens of one request and how often each was generated, from step to step.

    Slot i holds token `ids[i]` and its number of occurrences in the output, 0 for a token that
    only the prompt has.
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        self.request = request
        # The prompt counts for the repetition penalty alone.
        seen = request.prompt_token_ids if request.params.repetition_penalty != 1.0 else []
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(seen))}
        capacity = max(64, 2 * len(self._slots))
        self._ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._ids[: len(self._slots)] = torch.tensor(list(self._slots), dtype=torch.int64)
        self._counts = torch.zeros(capacity, dtype=torch.float32, device=device)
        self._num_counted = 0

    def apply(self, row: Tensor) -> None:
        """Penalise `row` [V] in place for the tokens so far."""
        for token_id in self.request.output_token_ids[self._num_counted :]:
            self._count(token_id)
        self._num_counted = self.request.num_output_tokens
        params = self.request.params
        ids, counts = self._ids[: len(self._slots)], self._counts[: len(self._slots)]
        values = row[ids]
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            values = torch.where(values > 0, values / penalty, values * penalty)
        values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        row[ids] = values

    def _count(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = torch.cat((self._ids, torch.zeros_like(self._ids)))
            self._counts = torch.cat((self._counts, torch.zeros_like(self._counts)))
        self._ids[slot] = token_id
        self._counts[slot] += 1
