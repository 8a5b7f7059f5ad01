"""Tokens that a request must not get: outside allowed_token_ids or its grammar, bad words, an end
before min_tokens.

Shapes: R rows, S rows with a grammar, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nsa_serve.request import Request
from nsa_serve.structured.masks import StepMasks


class Exclusions:
    """Sets logits to -inf; remembers the allowed_token_ids of a batch from step to step.

    eos_token_ids: what `min_tokens` holds back besides a request's own stop_token_ids.
    """

    def __init__(self, eos_token_ids: Sequence[int] = ()) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        # By request id: the request, and where its logits go to -inf.
        self._outside: dict[str, tuple[Request, Tensor]] = {}

    def apply(
        self, logits: Tensor, requests: Sequence[Request], masks: StepMasks | None = None
    ) -> None:
        """Change logits [R, V] in place, row i for `requests[i]`."""
        outside: dict[str, tuple[Request, Tensor]] = {}
        for row, request in enumerate(requests):
            if request.params.allowed_token_ids is not None:
                known = self._outside.get(request.request_id)
                if known is None or known[0] is not request:
                    known = request, _outside(request.params.allowed_token_ids, logits[row])
                outside[request.request_id] = known
                logits[row].masked_fill_(known[1], -torch.inf)
            ids = excluded_ids(request, self._eos_token_ids)
            if ids:
                logits[row, torch.tensor(ids, device=logits.device)] = -torch.inf
        # Those of requests that left the batch go with the old dict.
        self._outside = outside
        if masks is not None:
            apply_bitmask(logits, masks.rows, masks.bits)


def excluded_ids(
    request: Request, eos_token_ids: Sequence[int], position: int | None = None
) -> list[int]:
    """Return the tokens excluded by bad_words and min_tokens; some may come twice.

    position: of the token to choose in the output; default: the one after those known.
    """
    params, output = request.params, request.output_token_ids
    ids = [word[-1] for word in params.bad_words if _is_coming(word, output)]
    if (len(output) if position is None else position) < params.min_tokens and (
        # A grammar that allows nothing but the end goes before min_tokens: it cannot be left.
        request.matcher is None or not request.matcher.is_done
    ):
        ids += [*eos_token_ids, *params.stop_token_ids]
    return ids


def apply_bitmask(logits: Tensor, rows: Sequence[int], bits: NDArray[np.uint8]) -> None:
    """Set the logits of `rows` to -inf where their bit is 0, in place.

    logits: [R, V]. bits: uint8 [S, ceil(V / 8)], bit i % 8 (the lowest first) of byte i // 8 is for
    token i; row s is for `rows[s]`.
    """
    vocab_size = logits.shape[1]
    if logits.device.type == "cpu":
        flags = np.unpackbits(~bits, axis=1, count=vocab_size, bitorder="little")
        excluded = torch.from_numpy(flags).view(torch.bool)  # [S, V]
    else:
        # An eighth of the bytes to copy; they are spread out over there.
        excluded = excluded_tokens(torch.from_numpy(bits).to(logits.device), vocab_size)
    if len(rows) == logits.shape[0]:
        logits.masked_fill_(excluded, -torch.inf)
        return
    index = torch.tensor(rows, device=logits.device)
    logits[index] = logits[index].masked_fill_(excluded, -torch.inf)


def excluded_tokens(bits: Tensor, vocab_size: int) -> Tensor:
    """Return bool [S, V]: True where a bit of uint8 [S, ceil(V / 8)] is 0; on any device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, :, None] >> shifts & 1).flatten(1)[:, :vocab_size] == 0


def _outside(allowed_token_ids: Sequence[int], row: Tensor) -> Tensor:
    """Return bool [V]: True for every token that is not allowed."""
    outside = torch.ones_like(row, dtype=torch.bool)
    outside[torch.tensor(allowed_token_ids, device=row.device)] = False
    return outside


def _is_coming(word: Sequence[int], output: Sequence[int]) -> bool:
    """Return whether the last token of `word` would complete it."""
    start = len(word) - 1
    return start == 0 or (len(output) >= start and tuple(output[-start:]) == tuple(word[:-1]))
