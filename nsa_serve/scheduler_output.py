"""One step's plan and what came of it: the structs between scheduler, runner and sampler."""

from dataclasses import dataclass

import msgspec

from nsa_serve.request import FinishReason, Request, RequestStatus, TokenLogprobs, TokenOutput


class SampledToken(msgspec.Struct, frozen=True):
    """What the sampler chose for one row.

    blocks: by traced layer and KV head, when the request is traced.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    blocks: list[list[list[int]]] | None = None


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Tokens [start, start + num_tokens) of one request, to run in one step.

    samples: the row reaches the last known token, so its last position yields a new one.
    num_preemptions: the request's own count when the row was made.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    num_preemptions: int = 0

    @property
    def is_stale(self) -> bool:
        """True when the request ended or was preempted since: what the row computed is void."""
        request = self.request
        return (
            request.status is not RequestStatus.RUNNING
            or request.num_preemptions != self.num_preemptions
        )


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: its rows, the `num_decode_rows` rows that lacked exactly one token first.

    num_tokens: tokens of all rows. preempted: requests that lost their pages to this step.
    The runner appends to `Request.prompt_logprobs` for the rows that are not stale; a request that
    is preempted starts that list anew.
    """

    rows: list[ScheduledRow]
    num_tokens: int
    num_decode_rows: int
    preempted: list[Request]


def make_token_output(
    request: Request,
    tokens: list[SampledToken],
    finish_reason: FinishReason | None,
    stop_reason: int | None = None,
    *,
    is_first: bool,
) -> TokenOutput:
    """Report new tokens of a request; the first report carries what is said only once."""
    logprobs = [token.logprobs for token in tokens if token.logprobs is not None]
    blocks = [token.blocks for token in tokens if token.blocks is not None]
    has_prompt_logprobs = is_first and request.params.prompt_logprobs is not None
    return TokenOutput(
        request_id=request.request_id,
        token_ids=[token.token_id for token in tokens],
        logprobs=logprobs or None,
        prompt_logprobs=request.prompt_logprobs if has_prompt_logprobs else None,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        num_prefix_hit_tokens=request.num_prefix_hit_tokens,
        queued_s=request.queued_s if is_first else 0.0,
        blocks=blocks or None,
        num_preemptions=request.num_preemptions,
    )
