"""One step as tensors: what `SchedulerOutput` says in integers, laid out for the model.

T tokens of the step, R rows that sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from nsa_kernels.metadata import AttnMetadata, build_metadata
from nsa_kernels.spec import NSASpec
from nsa_serve.request import Request, TokenLogprobs
from nsa_serve.scheduler_output import ScheduledRow, SchedulerOutput


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Consecutive tokens of the step whose logits score the prompt tokens after them."""

    row: ScheduledRow
    first_row: int  # of the T rows
    targets: list[int]  # targets[i] is scored by row first_row + i

    @property
    def request(self) -> Request:
        """Whose prompt it is."""
        return self.row.request

    def report(self, entries: Sequence[TokenLogprobs]) -> None:
        """Give the request its next log-probabilities, unless it was preempted or ended since."""
        if not self.row.is_stale:
            self.request.prompt_logprobs += entries


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tensors of one step.

    input_ids: [T] int64. sampling_rows: [R] int64, the rows whose logits are sampled, for
    `sampling_requests` in the same order. output_positions: [R], which of its request's output
    tokens each of them yields, counted from 0. prompt_spans: what prompt_logprobs asked for.
    pending_tokens: (index in input_ids, request) of every token that the step before this one
    samples and that is not known on the host yet; -1 there until the runner fills it in.
    """

    input_ids: Tensor
    attn: AttnMetadata
    sampling_rows: Tensor
    sampling_requests: list[Request]
    output_positions: list[int]
    prompt_spans: list[PromptSpan]
    pending_tokens: list[tuple[int, Request]]


def build_batch(
    output: SchedulerOutput,
    spec: NSASpec,
    pages_of: Callable[[Request], Sequence[int]] = attrgetter("pages"),
    swa_pages_of: Callable[[Request], Sequence[int]] | None = None,
) -> ForwardBatch:
    """Lay out a scheduled step; rows keep the scheduler's order, decode rows first.

    pages_of: a request's pages, for a runner that has them in a form that is faster to read.
    swa_pages_of: its window pages; None where the model has none.
    """
    token_ids: list[int] = []
    sampling_rows: list[int] = []
    sampling_requests: list[Request] = []
    output_positions: list[int] = []
    prompt_spans: list[PromptSpan] = []
    pending_tokens: list[tuple[int, Request]] = []
    for row in output.rows:
        request, stop = row.request, row.start + row.num_tokens
        if request.params.prompt_logprobs is not None:
            targets = request.prompt_token_ids[row.start + 1 : stop + 1]
            if targets:
                prompt_spans.append(PromptSpan(row, len(token_ids), targets))
        token_ids += request.token_ids[row.start : stop]
        if stop > request.num_tokens:
            pending_tokens.append((len(token_ids), request))
            token_ids.append(-1)
        if row.samples:
            sampling_rows.append(len(token_ids) - 1)
            sampling_requests.append(request)
            output_positions.append(row.output_position)
    swa_pages = None
    if swa_pages_of is not None:
        swa_pages = [swa_pages_of(row.request) for row in output.rows]
    return ForwardBatch(
        input_ids=torch.tensor(token_ids, dtype=torch.int64),
        attn=build_metadata(
            [pages_of(row.request) for row in output.rows],
            [row.start for row in output.rows],
            [row.num_tokens for row in output.rows],
            spec,
            num_decode_rows=output.num_decode_rows,
            swa_pages=swa_pages,
        ),
        sampling_rows=torch.tensor(sampling_rows, dtype=torch.int64),
        sampling_requests=sampling_requests,
        output_positions=output_positions,
        prompt_spans=prompt_spans,
        pending_tokens=pending_tokens,
    )
