"""One step's plan and what came of it: the structs between scheduler, runner and sampler."""

from dataclasses import dataclass

import msgspec

from nsa_serve.request import FinishReason, Request, RequestStatus, TokenLogprobs, TokenOutput


class SampledToken(msgspec.Struct, frozen=True, gc=False):
    """What the sampler chose for one row.

    blocks: by traced layer and KV head, when the request is traced.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    blocks: list[list[list[int]]] | None = None


# Structs, here and above, since they are made for every row of every step: a frozen dataclass
# takes four times as long.
class ScheduledRow(msgspec.Struct, frozen=True, gc=False):
    """Tokens [start, start + num_tokens) of one request, to run in one step.

    samples: the row reaches the last token, so its last position yields a new one.
    num_preemptions: the request's own count when the row was made. has_pending_token: the row's
    last token was not known when it was made; a step that was in flight then samples it. Such a
    row has one token.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    num_preemptions: int = 0
    has_pending_token: bool = False

    @property
    def output_position(self) -> int:
        """Which of its request's output tokens the row samples, counted from 0."""
        return self.start + self.num_tokens - len(self.request.prompt_token_ids)

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
    token: SampledToken | None,
    finish_reason: FinishReason | None,
    stop_reason: int | None = None,
    *,
    is_first: bool,
) -> TokenOutput:
    """Report a new token of a request, or its end without one.

    The first report carries what is said only once.
    """
    has_prompt_logprobs = is_first and request.params.prompt_logprobs is not None
    return TokenOutput(
        request.request_id,
        [] if token is None else [token.token_id],
        None if token is None or token.logprobs is None else [token.logprobs],
        request.prompt_logprobs if has_prompt_logprobs else None,
        finish_reason,
        stop_reason,
        request.num_prefix_hit_tokens,
        queued_s=request.queued_s if is_first else 0.0,
        num_preemptions=request.num_preemptions,
        blocks=None if token is None or token.blocks is None else [token.blocks],
    )
