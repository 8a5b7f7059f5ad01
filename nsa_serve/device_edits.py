"""What requests change in their logits, packed on the host for one kernel a step.

What is constant over a request's life is packed once; tokens that penalties count are kept on the
device, where a step adds the new ones. A request that is not in a step loses what is kept and finds
it again in its tokens, so that a preemption does not matter.

Shapes: R rows, V vocabulary, W = ceil(V / 32) words of a mask.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nsa_kernels.gpu import logit_edits
from nsa_serve.exclusions import excluded_ids
from nsa_serve.logprobs import to_device
from nsa_serve.penalties import has_penalties
from nsa_serve.request import Request
from nsa_serve.structured.masks import StepMasks

Words = NDArray[np.int32]

# Tokens that a request may have seen before the tables are made anew; then they double.
_LEAST_CAPACITY = 1024


class LogitEditor:
    """Edits the logits of a batch on their device; remembers its requests from step to step.

    eos_token_ids: what `min_tokens` holds back besides a request's own stop_token_ids.
    """

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        *,
        vocab_size: int,
        max_num_rows: int,
        device: torch.device,
    ) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        self._device = device
        self._seen, self._allowed = logit_edits.new_tables(
            max_num_rows, _LEAST_CAPACITY, vocab_size, device
        )
        self._max_num_rows = max_num_rows
        self._known: dict[str, _RequestEdits] = {}
        self.forget()

    def forget(self) -> None:
        """Forget what the device knows of requests; it is told anew."""
        self._known.clear()
        self._free_slots = list(range(self._max_num_rows))

    def apply(
        self,
        logits: Tensor,
        requests: Sequence[Request],
        positions: Sequence[int],
        masks: StepMasks | None = None,
    ) -> None:
        """Change logits, float32 [R, V], in place, row i for `requests[i]`.

        positions: which token of its output each row chooses, from 0. masks: what grammars allow.
        """
        grammar_rows = {} if masks is None else {row: i for i, row in enumerate(masks.rows)}
        rows = self._edited_rows(requests, grammar_rows)
        packing = _Packing(len(rows), self._num_words)
        has_masks = bool(grammar_rows)
        for index, (row, edits) in enumerate(rows):
            fields = packing.fields[index]
            fields[logit_edits.ROW] = row
            edits.pack(fields, packing)
            excluded = excluded_ids(edits.request, self._eos_token_ids, positions[row])
            packing.add_list(fields, logit_edits.EXCLUDED_FIRST, np.array(excluded, np.int32))
            if masks is not None and row in grammar_rows:
                fields[logit_edits.MASK_FIRST] = packing.add_mask(masks.bits[grammar_rows[row]])
            has_masks |= edits.request.params.allowed_token_ids is not None
        if rows:
            packed = to_device(torch.from_numpy(packing.joined()), self._device)
            logit_edits.edit_logits(
                logits,
                packed,
                len(rows),
                seen=self._seen,
                allowed=self._allowed,
                has_masks=has_masks,
            )

    def warm_up(self, logits: Tensor) -> None:
        """Compile the kernel with an edit of row 0 that changes nothing."""
        packing = _Packing(1, self._num_words)
        fields = packing.fields[0]
        for name in (logit_edits.SEEN_SLOT, logit_edits.MASK_FIRST, logit_edits.ALLOWED_SLOT):
            fields[name] = logit_edits.ABSENT
        logit_edits.edit_logits(
            logits,
            to_device(torch.from_numpy(packing.joined()), self._device),
            1,
            seen=self._seen,
            allowed=self._allowed,
            has_masks=False,
        )

    def _edited_rows(
        self, requests: Sequence[Request], masked_rows: Container[int]
    ) -> list[tuple[int, "_RequestEdits"]]:
        """Return the rows with edits, and forget requests that are not among these."""
        gone = self._known
        known: dict[str, _RequestEdits] = {}
        fresh: list[_RequestEdits] = []
        rows = []
        for row, request in enumerate(requests):
            if row not in masked_rows and not has_edits(request):
                continue
            edits = gone.get(request.request_id)
            if edits is not None and edits.request is request:
                del gone[request.request_id]
            else:
                edits = _RequestEdits(request)
                fresh.append(edits)
            known[request.request_id] = edits
            rows.append((row, edits))
        self._free_slots += [edits.slot for edits in gone.values()]
        self._known = known
        for edits in fresh:
            self._admit(edits)
        self._grow(known)
        return rows

    def _admit(self, edits: "_RequestEdits") -> None:
        edits.slot = self._free_slots.pop()
        allowed = edits.request.params.allowed_token_ids
        if allowed is not None:
            flags = np.zeros(self._num_words * 32, dtype=np.uint8)
            flags[list(allowed)] = 1
            bits = np.packbits(flags, bitorder="little").view(np.int32)
            self._allowed[edits.slot].copy_(to_device(torch.from_numpy(bits), self._device))

    def _grow(self, known: dict[str, "_RequestEdits"]) -> None:
        """Make room for all seen tokens; the device gets them anew when the table is a new one."""
        most = 0
        for edits in known.values():
            if edits.seen is not None:
                edits.seen.advance(edits.request.output_token_ids)
                most = max(most, len(edits.seen.counts))
        capacity = self._seen.shape[2]
        if most <= capacity:
            return
        while capacity < most:
            capacity *= 2
        self._seen = self._seen.new_zeros(self._seen.shape[0], 2, capacity)
        for edits in known.values():
            if edits.seen is not None:
                edits.seen.changed = dict.fromkeys(range(len(edits.seen.counts)))


def has_edits(request: Request) -> bool:
    """Return whether a request may change its logits in some step, other than by a grammar."""
    params = request.params
    return (
        bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or bool(params.bad_words)
        or params.min_tokens > 0
        or has_penalties(params)
    )


class _Packing:
    """The buffer of one step: fields of each edit, and the lists and masks they point to."""

    def __init__(self, num_edits: int, num_words: int) -> None:
        self.fields = np.zeros((num_edits, logit_edits.NUM_FIELDS), dtype=np.int32)
        self._num_words = num_words
        self._parts: list[Words] = [self.fields.reshape(-1)]
        self._size = self.fields.size

    def add_list(self, fields: Words, first_field: int, *columns: Words) -> None:
        """Append columns of one length, and note where the first begins and ends."""
        fields[first_field] = self._size
        fields[first_field + 1] = self._size + len(columns[0])
        self._parts += columns
        self._size += len(columns) * len(columns[0])

    def add_mask(self, bits: NDArray[np.uint8]) -> int:
        """Append a mask of bytes, and return where it begins. Tokens beyond it are allowed."""
        words = np.full(self._num_words * 4, 0xFF, dtype=np.uint8)
        num_bytes = min(len(bits), len(words))
        words[:num_bytes] = bits[:num_bytes]
        first = self._size
        self._parts.append(words.view(np.int32))
        self._size += self._num_words
        return first

    def joined(self) -> Words:
        return np.concatenate(self._parts)


@dataclass(slots=True)
class _Seen:
    """The distinct tokens of one request, and how often each was generated.

    token_ids, counts: by place. places: of each token id. changed: places, in order, whose count
    the device lacks.
    """

    token_ids: list[int]
    counts: list[int]
    places: dict[int, int]
    changed: dict[int, None]
    num_counted: int = 0

    def advance(self, output_token_ids: Sequence[int]) -> None:
        """Count the tokens since the last time."""
        for token_id in output_token_ids[self.num_counted :]:
            place = self.places.setdefault(token_id, len(self.counts))
            if place == len(self.counts):
                self.token_ids.append(token_id)
                self.counts.append(0)
            self.counts[place] += 1
            self.changed[place] = None
        self.num_counted = len(output_token_ids)

    def take_changes(self) -> tuple[Words, Words, Words]:
        """Return places, token ids and counts of what changed."""
        places = list(self.changed)
        self.changed = {}
        return (
            np.array(places, dtype=np.int32),
            np.array([self.token_ids[place] for place in places], dtype=np.int32),
            np.array([self.counts[place] for place in places], dtype=np.int32),
        )


@dataclass(slots=True)
class _RequestEdits:
    """The edits of one request; `slot` is its place in the tables on the device."""

    request: Request
    slot: int = logit_edits.ABSENT
    seen: _Seen | None = None
    bias: tuple[Words, Words] | None = None
    penalties: Words = field(default_factory=lambda: np.zeros(3, np.int32))

    def __post_init__(self) -> None:
        params = self.request.params
        if params.logit_bias:
            values = np.fromiter(params.logit_bias.values(), dtype=np.float32)
            self.bias = np.fromiter(params.logit_bias, dtype=np.int32), values.view(np.int32)
        if has_penalties(params):
            # The prompt counts for the repetition penalty alone.
            prompt = self.request.prompt_token_ids if params.repetition_penalty != 1.0 else []
            token_ids = list(dict.fromkeys(prompt))
            self.seen = _Seen(
                token_ids,
                [0] * len(token_ids),
                {token_id: place for place, token_id in enumerate(token_ids)},
                dict.fromkeys(range(len(token_ids))),
            )
            self.penalties = np.array(
                [params.repetition_penalty, params.presence_penalty, params.frequency_penalty],
                dtype=np.float32,
            ).view(np.int32)

    def pack(self, fields: Words, packing: _Packing) -> None:
        """Write all fields but those that depend on the step."""
        fields[logit_edits.SEEN_SLOT] = logit_edits.ABSENT
        fields[logit_edits.MASK_FIRST] = logit_edits.ABSENT
        fields[logit_edits.ALLOWED_SLOT] = logit_edits.ABSENT
        if self.bias is not None:
            packing.add_list(fields, logit_edits.BIAS_FIRST, *self.bias)
        if self.seen is not None:
            packing.add_list(fields, logit_edits.NEWS_FIRST, *self.seen.take_changes())
            fields[logit_edits.SEEN_SLOT] = self.slot
            fields[logit_edits.NUM_SEEN] = len(self.seen.counts)
            fields[logit_edits.REPETITION : logit_edits.FREQUENCY + 1] = self.penalties
        if self.request.params.allowed_token_ids is not None:
            fields[logit_edits.ALLOWED_SLOT] = self.slot
