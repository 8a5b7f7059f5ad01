"""Deltas into one output: a stream that is read late, a completion that is not streamed."""

from collections.abc import Iterable, Sequence
from itertools import chain

from nsa_serve.request import RequestOutput, TokenLogprobs


def fold(outputs: Iterable[RequestOutput]) -> RequestOutput:
    """Join consecutive outputs of one sample into one: what they hold together, in order.

    Raises ValueError when there are none, or when they are of several samples.
    """
    parts = list(outputs)
    if not parts:
        raise ValueError("fold needs at least one output, got none")
    first, last = parts[0], parts[-1]
    if len(parts) == 1:
        return first
    if any(part.index != first.index or part.request_id != first.request_id for part in parts):
        raise ValueError("fold needs the outputs of one sample, got several")
    return RequestOutput(
        request_id=first.request_id,
        index=first.index,
        text="".join([part.text for part in parts]),
        token_ids=list(chain.from_iterable([part.token_ids for part in parts])),
        logprobs=_join_logprobs(parts),
        prompt_token_ids=next(
            (part.prompt_token_ids for part in parts if part.prompt_token_ids is not None), None
        ),
        prompt_logprobs=next(
            (part.prompt_logprobs for part in parts if part.prompt_logprobs is not None), None
        ),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        num_prompt_tokens=last.num_prompt_tokens,
        num_output_tokens=last.num_output_tokens,
        num_prefix_hit_tokens=last.num_prefix_hit_tokens,
        blocks=_join_blocks(parts),
    )


def fold_by_index(outputs: Iterable[RequestOutput]) -> list[RequestOutput]:
    """Fold interleaved outputs of one request's samples: one output a sample, by first arrival."""
    samples: dict[int, list[RequestOutput]] = {}
    for output in outputs:
        samples.setdefault(output.index, []).append(output)
    return [fold(parts) for parts in samples.values()]


def _join_logprobs(parts: Sequence[RequestOutput]) -> list[TokenLogprobs] | None:
    if all(part.logprobs is None for part in parts):
        return None
    return [entry for part in parts for entry in part.logprobs or ()]


def _join_blocks(parts: Sequence[RequestOutput]) -> list[list[list[list[int]]]] | None:
    if all(part.blocks is None for part in parts):
        return None
    return [entry for part in parts for entry in part.blocks or ()]
