"""Sampling on a GPU: the rules of `sampler`, without waiting for the device.

Tokens stay in `DeviceSampler.token_ids`, where the next step reads them, and come to the host
through a `SampleHandle`.

Shapes: R rows, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_kernels.gpu.sampling import NUM_PARAMS, SamplingWorkspace, sample_tokens
from nsa_serve.device_edits import LogitEditor, has_edits
from nsa_serve.logprobs import PendingLogprobs, record_event, to_device
from nsa_serve.request import Request, SamplingParams
from nsa_serve.sampler import SamplingFailure, failure_of, needs_history, uniform
from nsa_serve.scheduler_output import SampledToken
from nsa_serve.structured.masks import StepMasks

# Steps whose parameters may be on their way to the device at once.
_NUM_BUFFERS = 3


class PromptScores(PendingLogprobs):
    """Log-probabilities of the tokens of a prompt: logits [N, V], a target and entry for each."""

    def __init__(self, logits: Tensor, targets: Sequence[int], num_top: int) -> None:
        super().__init__(logits, torch.tensor(targets, dtype=torch.int64), num_top)


class DeviceSampler:
    """Turns logits on a device into tokens there.

    eos_token_ids: what `min_tokens` holds back besides a request's own stop_token_ids.
    token_ids: int64 [max_num_rows] on the device, the tokens of the last step.
    """

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        *,
        vocab_size: int,
        max_num_rows: int,
        device: torch.device,
    ) -> None:
        self.max_num_rows = max_num_rows
        # One tensor, so that a step's tokens come to the host in one copy.
        self._chosen = torch.zeros(3 * max_num_rows, dtype=torch.int32, device=device)
        self.token_ids, self._peaks = _split(self._chosen)
        # All 0: greedy rows.
        self._params = torch.zeros(NUM_PARAMS, max_num_rows, dtype=torch.float64, device=device)
        self._workspace = SamplingWorkspace.create(max_num_rows, vocab_size, device)
        self._editor = LogitEditor(
            eos_token_ids, vocab_size=vocab_size, max_num_rows=max_num_rows, device=device
        )
        is_cuda = device.type == "cuda"
        self._buffers = [
            torch.zeros(self._params.shape, dtype=torch.float64, pin_memory=is_cuda)
            for _ in range(_NUM_BUFFERS)
        ]
        self._events: list[torch.cuda.Event | None] = [None] * _NUM_BUFFERS
        self._next_buffer = 0
        # Those that no step is using.
        self._free_copies: list[Tensor] = []
        self._batch = _Batch([])
        # What the device has: nothing needs to be copied while all rows stay greedy.
        self._has_drawn = False

    def needs_history(self, requests: Sequence[Request]) -> bool:
        """Return whether some choice depends on its request's output so far."""
        return self._batch_of(requests).needs_history

    def is_greedy(self, requests: Sequence[Request]) -> bool:
        """Return whether `run_kernels(..., is_greedy=True)` does for these rows."""
        return self._batch_of(requests).is_greedy

    def launch(
        self,
        logits: Tensor,
        requests: Sequence[Request],
        positions: Sequence[int],
        masks: StepMasks | None = None,
        *,
        run: Callable[[], None] | None = None,
    ) -> "SampleHandle":
        """Queue all that chooses a token for each of the R rows.

        logits: float32 [R, V], row i for `requests[i]`; they are overwritten. positions: which of
        its output tokens each row yields, from 0. masks: what grammars allow. run: what runs the
        kernels for these very logits; default: `run_kernels`.
        """
        raw = self._reported_logits(logits, requests)
        self.prepare(requests, positions)
        self.edit(logits, requests, positions, masks)
        if run is None:
            self.run_kernels(logits, len(requests), is_greedy=self.is_greedy(requests))
        else:
            run()
        return self.collect(requests, raw, masks)

    def edit(
        self,
        logits: Tensor,
        requests: Sequence[Request],
        positions: Sequence[int],
        masks: StepMasks | None = None,
    ) -> None:
        """Queue logit bias, penalties and exclusions; nothing when no row has any."""
        if masks is None and not self._batch_of(requests).has_edits:
            requests, positions = [], []  # what is remembered of earlier ones can go
        self._editor.apply(logits, requests, positions, masks)

    def prepare(self, requests: Sequence[Request], positions: Sequence[int]) -> None:
        """Queue the copy of parameters and random numbers; rows beyond the requests are greedy."""
        if len(requests) > self.max_num_rows:
            raise ValueError(
                f"at most {self.max_num_rows} rows can be sampled, got {len(requests)}"
            )
        has_drawn = not self.is_greedy(requests)
        if not has_drawn and not self._has_drawn:
            return
        self._has_drawn = has_drawn
        index, self._next_buffer = self._next_buffer, (self._next_buffer + 1) % _NUM_BUFFERS
        event = self._events[index]
        if event is not None:
            event.synchronize()
        buffer = self._buffers[index]
        host = buffer.numpy()  # [NUM_PARAMS, max_num_rows]
        host.fill(0.0)
        columns = [
            _row_params(request, position)
            for request, position in zip(requests, positions, strict=True)
        ]
        if columns:
            host.T[: len(columns)] = columns
        self._params.copy_(buffer, non_blocking=True)
        self._events[index] = record_event(self._params.device)

    def run_kernels(self, logits: Tensor, num_rows: int, *, is_greedy: bool = False) -> None:
        """Launch the kernels on static buffers: what a CUDA graph may hold.

        logits: float32 [>= num_rows, V]. is_greedy: leave out what greedy rows do not need.
        """
        sample_tokens(
            logits[:num_rows],
            self._params,
            self.token_ids,
            self._peaks,
            workspace=self._workspace,
            is_greedy=is_greedy,
        )

    def warm_up(self, logits: Tensor) -> None:
        """Compile every kernel, also those that few requests need.

        logits: float32 [>= 1, V], of any content; what `token_ids` has is lost.
        """
        for is_greedy in (True, False):
            self.run_kernels(logits, 1, is_greedy=is_greedy)
        self._editor.warm_up(logits)

    def forget(self) -> None:
        """Forget what the device knows of requests; it is told anew."""
        self._batch = _Batch([])
        self._editor.forget()

    def collect(
        self,
        requests: Sequence[Request],
        raw_logits: Tensor | None = None,
        masks: StepMasks | None = None,
    ) -> "SampleHandle":
        """Queue the copy of the step's tokens to the host.

        raw_logits: the model's own, float32, of the rows that report log-probabilities.
        """
        logprobs = None
        if raw_logits is not None:
            rows = self._batch_of(requests).reported_rows
            index = to_device(torch.tensor(rows), self.token_ids.device)
            tops = [requests[row].params.logprobs or 0 for row in rows]
            logprobs = PendingLogprobs(raw_logits, self.token_ids.index_select(0, index), tops)
        return SampleHandle(
            list(requests),
            self._to_host(),
            self._free_copies,
            logprobs,
            masks,
            record_event(self.token_ids.device),
        )

    def _to_host(self) -> Tensor:
        """Queue the copy of what was chosen, to memory that no step waits for."""
        if not self._free_copies:
            is_cuda = self._chosen.is_cuda
            copy = torch.empty(self._chosen.shape, dtype=torch.int32, pin_memory=is_cuda)
            self._free_copies.append(copy)
        return self._free_copies.pop().copy_(self._chosen, non_blocking=True)

    def _reported_logits(self, logits: Tensor, requests: Sequence[Request]) -> Tensor | None:
        rows = self._batch_of(requests).reported_rows
        if not rows:
            return None
        return logits.index_select(0, to_device(torch.tensor(rows), logits.device))

    def _batch_of(self, requests: Sequence[Request]) -> "_Batch":
        if self._batch.requests != requests:
            self._batch = _Batch(list(requests))
        return self._batch


class _Batch:
    """What the requests of a step ask for, which is the same in most steps that follow."""

    __slots__ = ("has_edits", "is_greedy", "needs_history", "reported_rows", "requests")

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        self.needs_history = any(needs_history(request) for request in requests)
        self.is_greedy = all(request.params.is_greedy for request in requests)
        self.has_edits = any(has_edits(request) for request in requests)
        self.reported_rows = _reported_rows(requests)


@dataclass(frozen=True, slots=True)
class SampleHandle:
    """The tokens of a step that come to the host; to be read once.

    copy: the sampler's tokens and peaks there, see `_split`. free_copies: where it goes when it was
    read.
    """

    requests: list[Request]
    copy: Tensor
    free_copies: list[Tensor]
    logprobs: PendingLogprobs | None
    masks: StepMasks | None
    event: torch.cuda.Event | None

    def result(self) -> list[SampledToken | SamplingFailure]:
        """Wait for this step alone; return a token a row, or why there is none."""
        if self.event is not None:
            self.event.synchronize()
        entries = {}
        if self.logprobs is not None:
            rows = _reported_rows(self.requests)
            entries = dict(zip(rows, self.logprobs.result(), strict=True))
        failures = {} if self.masks is None else self.masks.failures
        results: list[SampledToken | SamplingFailure] = []
        num_rows = len(self.requests)
        token_ids, peaks = (part[:num_rows].tolist() for part in _split(self.copy))
        self.free_copies.append(self.copy)
        if not failures and not entries and all(map(math.isfinite, peaks)):
            return [SampledToken(token_id) for token_id in token_ids]
        tokens = zip(self.requests, token_ids, peaks, strict=True)
        for row, (request, token_id, peak) in enumerate(tokens):
            failure = failures.get(row)
            if failure is not None:
                results.append(SamplingFailure(failure.message, failure.is_request_fault))
            elif math.isfinite(peak):
                results.append(SampledToken(token_id, entries.get(row)))
            else:
                results.append(failure_of(request.params, peak))
        return results


def _split(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two parts of int32 [3 * N]: token ids int64 [N], and peaks float32 [N]."""
    end = len(chosen) // 3 * 2
    return chosen[:end].view(torch.int64), chosen[end:].view(torch.float32)


def _reported_rows(requests: Sequence[Request]) -> list[int]:
    return [row for row, item in enumerate(requests) if item.params.logprobs is not None]


def _row_params(request: Request, position: int) -> tuple[float, float, float, float, float]:
    """Return a column of `sample_tokens`'s params."""
    params: SamplingParams = request.params
    if params.is_greedy:
        return (0.0, 0.0, 1.0, 0.0, 0.0)
    return (
        params.temperature,
        max(params.top_k, 0),
        params.top_p,
        params.min_p,
        uniform(request.sampling_seed, position),
    )
