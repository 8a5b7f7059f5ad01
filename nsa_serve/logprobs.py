"""Log-probabilities to report: of the chosen token, its rank, and the likeliest tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_serve.request import MAX_LOGPROBS, TokenLogprobs

# Rows normalised at once: 64 x 128k fp32 are 32 MiB.
_LOGPROB_ROWS = 64


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: int | Sequence[int]
) -> list[TokenLogprobs]:
    """Return the log-probability, rank and `num_top` likeliest tokens for each row of logits.

    logits: [N, V], of the model itself. token_ids: N ids. num_top: 0..20, one for all or one a row.
    Equal log-probabilities share a rank and are listed by token id.
    """
    return PendingLogprobs(logits, torch.tensor(token_ids, dtype=torch.int64), num_top).result()


class PendingLogprobs:
    """Log-probabilities that are computed where the logits are, and read later.

    logits: [N, V]; they may be overwritten afterwards. token_ids: int64 [N]; on another device than
    the logits they are copied there. num_top: as for `token_logprobs`.
    """

    def __init__(self, logits: Tensor, token_ids: Tensor, num_top: int | Sequence[int]) -> None:
        num_rows = len(token_ids)
        assert logits.shape[0] == num_rows, (logits.shape, num_rows)
        self._tops = [num_top] * num_rows if isinstance(num_top, int) else list(num_top)
        token_ids = to_device(token_ids, logits.device)
        parts = []
        for start in range(0, num_rows, _LOGPROB_ROWS):
            stop = start + _LOGPROB_ROWS
            parts.append(_measure(logits[start:stop], token_ids[start:stop]))
        # Of each part: [n, 1 + tops] float32 and [n, 2 + tops] int64.
        self._parts = [(to_host(values), to_host(ids)) for values, ids in parts]
        self._event = record_event(logits.device)

    def result(self) -> list[TokenLogprobs]:
        """Wait for the device, and return an entry a row."""
        if self._event is not None:
            self._event.synchronize()
        entries: list[TokenLogprobs] = []
        for values, ids in self._parts:
            for row_values, row_ids in zip(values.tolist(), ids.tolist(), strict=True):
                num_top = self._tops[len(entries)]
                top = zip(row_ids[2 : 2 + num_top], row_values[1 : 1 + num_top], strict=True)
                entries.append(
                    TokenLogprobs(
                        token_id=row_ids[0],
                        logprob=row_values[0],
                        rank=row_ids[1],
                        top=list(top),
                    )
                )
        return entries


def _measure(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the chosen and the top tokens, and id, rank and ids of the top.

    logits: [n, V]. token_ids: int64 [n].
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(-1, keepdim=True) + 1
    # Always as many as any request may ask for, so that ties do not depend on the neighbours.
    values, ids = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[1]), sorted=False)
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    return torch.cat((chosen, values), dim=1), torch.cat((token_ids[:, None], ranks, ids), dim=1)


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy on the host, which a GPU fills later: wait for an event recorded after it."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device without waiting for it, or the tensor if it is there."""
    if tensor.device.type == device.type:
        return tensor
    # The allocator keeps the pinned memory until the copy has been made.
    return tensor.pin_memory().to(device, non_blocking=True)


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """Return an event after all that is queued on a GPU; None on a CPU, which does not queue."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
