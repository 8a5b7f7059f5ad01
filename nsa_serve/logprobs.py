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
    assert logits.shape[0] == len(token_ids), (logits.shape, len(token_ids))
    tops = [num_top] * len(token_ids) if isinstance(num_top, int) else list(num_top)
    entries: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), _LOGPROB_ROWS):
        stop = start + _LOGPROB_ROWS
        rows = logits[start:stop].float().log_softmax(-1)
        entries += _logprob_entries(rows, token_ids[start:stop], tops[start:stop])
    return entries


def _logprob_entries(
    logprobs: Tensor, token_ids: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprobs]:
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device)[:, None])
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    # Always as many as any request may ask for, so that ties do not depend on the neighbours.
    values, ids = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[1]), sorted=False)
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    top_ids, top_values = ids.gather(1, order).tolist(), values.tolist()
    return [
        TokenLogprobs(
            token_id=token_id,
            logprob=logprob,
            rank=rank,
            top=list(zip(row_ids[:num_top], row_values[:num_top], strict=True)),
        )
        for token_id, logprob, rank, row_ids, row_values, num_top in zip(
            token_ids, chosen[:, 0].tolist(), ranks, top_ids, top_values, tops, strict=True
        )
    ]
