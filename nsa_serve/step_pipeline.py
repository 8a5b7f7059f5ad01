"""Steps one behind the other: while one is in flight, the next is scheduled and launched.

With overlapped steps the tokens of step n are read when step n + 1 is on its way, so that a device
never waits for Python. What a step needs of the tokens before it, it takes on the device; only
where the host must know them (grammars, penalties), its sampling waits for them, beside the forward
pass. Without, each step is finished before the next is scheduled.
"""

from typing import Generic, Protocol, TypeVar

from nsa_serve.cache_reads import CacheReads, ReadCosts, step_reads
from nsa_serve.errors import RequestError
from nsa_serve.request import TokenOutput
from nsa_serve.sampler import SamplingFailure
from nsa_serve.scheduler import SampledToken, Scheduler, SchedulerOutput


class LaunchedStep(Protocol):
    """A step that a runner works on.

    needs_history: it must not be sampled before the requests have the tokens of earlier steps.
    """

    @property
    def scheduled(self) -> SchedulerOutput: ...

    @property
    def needs_history(self) -> bool: ...


StepT = TypeVar("StepT", bound=LaunchedStep)


class Runner(Protocol[StepT]):
    """What runs steps. Each is launched, sampled and read, in order.

    result waits for the step and gives prompt log-probabilities to the requests.
    """

    def launch(self, output: SchedulerOutput) -> StepT: ...

    def sample(self, step: StepT) -> None: ...

    def result(self, step: StepT) -> dict[str, SampledToken | SamplingFailure]: ...

    def reset(self) -> None:
        """Forget what steps have left behind, because some are taken back."""
        ...


class StepPipeline(Generic[StepT]):
    """A scheduler and a runner, with at most one step in flight between two calls of `step`.

    is_overlapped: leave a step in flight. costs: what queries need of the cache.

    The counts are of finished steps, so that they match the tokens that `step` returned with them:
    num_steps is their number; num_step_tokens, decode_reads and prefill_reads (see `step_reads`)
    are those of the last call, 0 when it finished none.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner[StepT],
        costs: ReadCosts,
        *,
        is_overlapped: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.is_overlapped = is_overlapped
        self._costs = costs
        self._in_flight: StepT | None = None
        # Scheduled and not finished, the oldest first.
        self._outstanding: list[SchedulerOutput] = []
        # Of steps that are finished, not returned yet.
        self._outputs: list[TokenOutput] = []
        self.reset_counts()

    @property
    def has_step_in_flight(self) -> bool:
        """True when a step was launched whose tokens were not read: `step` will wait for it."""
        return self._in_flight is not None

    def reset_counts(self) -> None:
        """Count from here on."""
        self.num_steps = 0
        self._clear_last_step()

    def step(self) -> list[TokenOutput]:
        """Launch the next step and finish the one before it; return what that produced.

        Without overlapping, the step that was launched is finished. When a step fails, those that
        are not finished are taken back, and their rows will be scheduled again; what was finished
        comes with the next call.
        """
        self._clear_last_step()
        previous, self._in_flight = self._in_flight, None
        try:
            launched = self._launch()
            if launched is not None and not launched.needs_history:
                self.runner.sample(launched)
            if previous is not None:
                self._finish(previous)
            if launched is not None and launched.needs_history:
                self.runner.sample(launched)
            if self.is_overlapped:
                self._in_flight = launched
            elif launched is not None:
                self._finish(launched)
        except BaseException:
            self.runner.reset()
            while self._outstanding:
                self.scheduler.discard(self._outstanding.pop())
            raise
        outputs, self._outputs = self._outputs, []
        return outputs

    def forget(self) -> None:
        """Forget the step in flight, whose requests were aborted."""
        self._in_flight = None
        self._outstanding.clear()

    def _launch(self) -> StepT | None:
        """Schedule a step and launch it; None when there is nothing to run now."""
        scheduled = self.scheduler.schedule()
        if not scheduled.rows:
            return None
        self._outstanding.append(scheduled)
        return self.runner.launch(scheduled)

    def _finish(self, step: StepT) -> None:
        """Take in the tokens; a row that could not be sampled ends its own request only."""
        sampled = self.runner.result(step)
        scheduled = step.scheduled
        # From here on the step is no longer one to take back.
        self._outstanding.pop(0)
        self.num_steps += 1
        self.num_step_tokens = scheduled.num_tokens
        self.decode_reads, self.prefill_reads = step_reads(scheduled, self._costs)
        tokens: dict[str, SampledToken] = {}
        failures: dict[str, SamplingFailure] = {}
        for request_id, result in sampled.items():
            if isinstance(result, SamplingFailure):
                failures[request_id] = result
            else:
                tokens[request_id] = result
        if failures:
            self._fail(scheduled, failures)
        self._outputs += self.scheduler.update(scheduled, tokens)

    def _fail(self, scheduled: SchedulerOutput, failures: dict[str, SamplingFailure]) -> None:
        for row in scheduled.rows:
            failure = failures.get(row.request.request_id)
            # Another request may have the id of one that ended since.
            if failure is not None and not row.is_stale:
                kind = RequestError.__name__ if failure.is_request_fault else None
                name = row.request.request_id
                self._outputs.append(self.scheduler.fail(name, failure.message, error_kind=kind))

    def _clear_last_step(self) -> None:
        self.num_step_tokens = 0
        self.decode_reads, self.prefill_reads = CacheReads(), CacheReads()
