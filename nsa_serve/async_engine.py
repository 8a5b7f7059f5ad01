"""The engine for asyncio: it runs in a process of its own, and this supervises it.

`AsyncEngine` checks requests, sends them to the engine process, turns its tokens into text and
hands them to the streams that `generate` returned. One callback per step does all of that; there
is no task per request here.
"""

import asyncio
import contextvars
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from nsa_serve.config import EngineConfig
from nsa_serve.engine_supervisor import ENGINE_COMMAND, EngineProcess
from nsa_serve.errors import (
    CapacityError,
    ConfigError,
    EngineDeadError,
    ModelError,
    NSAServeError,
    QueueFullError,
    RequestError,
)
from nsa_serve.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineInfo,
    EngineReady,
    EngineStats,
    FromEngine,
    LoadProgress,
    StepOutputs,
)
from nsa_serve.metrics import Metrics
from nsa_serve.model_source import load_tokenizer
from nsa_serve.output import OutputProcessor
from nsa_serve.request import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenOutput,
    TraceParams,
)
from nsa_serve.request_check import check_request, make_request_error, sample_params
from nsa_serve.request_stream import RequestStream, StreamSink
from nsa_serve.request_timer import RequestTimer, SampleGroup
from nsa_serve.tokenizer import Tokenizer
from nsa_serve.trace import check_trace

STALL_TIMEOUT_S = 60.0
SHUTDOWN_TIMEOUT_S = 5.0

_MAX_RETRY_AFTER_S = 120
_NUM_RECENT = 64

logger = logging.getLogger(__name__)


class _Sample:
    """One of the `n` samples of a request, while the engine works on it.

    context: of the caller, so that what is logged about it later bears the caller's request id.
    """

    __slots__ = ("context", "sink", "timer")

    def __init__(self, sink: StreamSink, timer: RequestTimer | None) -> None:
        self.sink = sink
        self.timer = timer
        self.context = contextvars.copy_context()


class AsyncEngine:
    """An engine process and its requests; implements `EngineClient`. Make one with `start`."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_progress: Callable[[LoadProgress], None] | None = None,
        metrics: Metrics | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._config = config
        self._on_progress = on_progress
        self._metrics = metrics
        self._stall_timeout_s = stall_timeout_s
        self._process: EngineProcess | None = None
        self._outputs: OutputProcessor | None = None
        self._tokenizer: Tokenizer | None = None
        self._samples: dict[str, _Sample] = {}
        self._stats = EngineStats()
        self._ready: asyncio.Future[EngineInfo] = loop.create_future()
        self._info: EngineInfo | None = None
        self._failure: EngineFailed | None = None
        self._death: EngineDeadError | None = None
        self._died = asyncio.Event()
        self._is_closing = False
        self._last_progress_s = time.monotonic()
        self._finish_times_s: deque[float] = deque(maxlen=_NUM_RECENT)

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        on_progress: Callable[[LoadProgress], None] | None = None,
        metrics: Metrics | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        command: Sequence[str] = ENGINE_COMMAND,
        make_tokenizer: Callable[[EngineConfig], Tokenizer] = load_tokenizer,
    ) -> "AsyncEngine":
        """Start the engine process, and load the tokenizer while it loads the model.

        stall_timeout_s: how long the engine may be silent, or have work and make no progress,
        before `check_health` raises. Raises ModelError, CapacityError, ConfigError or
        EngineDeadError; no process is left behind then.
        """
        self = cls(
            config, on_progress=on_progress, metrics=metrics, stall_timeout_s=stall_timeout_s
        )
        process = await EngineProcess.spawn(command, self._on_message)
        self._process = process
        assert process.ended is not None
        process.ended.add_done_callback(self._on_process_end)
        process.send_bytes(config.model_dump_json().encode())
        tokenizer = asyncio.create_task(asyncio.to_thread(make_tokenizer, config))
        try:
            self._info, self._tokenizer = await asyncio.gather(self._ready, tokenizer)
        except BaseException:
            tokenizer.cancel()
            self._ready.cancel()
            self._is_closing = True
            await process.stop(timeout_s=0.0)
            raise
        self._outputs = OutputProcessor(self.tokenizer)
        self._last_progress_s = time.monotonic()
        if metrics is not None:
            metrics.on_engine_ready(self.info)
        return self

    @property
    def info(self) -> EngineInfo:
        """What was loaded and what fits."""
        assert self._info is not None
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer and chat template."""
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def stats(self) -> EngineStats:
        """Counters and gauges after the last step."""
        return self._stats

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        assert self._process is not None
        return self._process.pid

    @property
    def num_requests(self) -> int:
        """Samples that wait or run."""
        return len(self._samples)

    def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        n: int = 1,
        priority: int = 0,
        cache_salt: str | None = None,
        trace: TraceParams | None = None,
    ) -> RequestStream:
        """Queue `n` samples and return the stream of their outputs; see `EngineClient`.

        Sample i of a seeded request has the seed `params.seed + i`. From its stream, a request
        raises RequestError when the engine refuses it, EngineDeadError when the engine dies while
        it runs, and NSAServeError when it fails otherwise.
        """
        if self._death is not None:
            raise self._make_death()
        check_request(prompt_token_ids, params, n, self.info)
        if trace is not None:
            check_trace(trace, self.info)
        self._check_queue(n)
        sink = StreamSink(n)
        group = None if self._metrics is None else self._metrics.start_group(n)
        try:
            for index in range(n):
                internal_id = f"{request_id}-{index}-{uuid.uuid4().hex}"
                request = EngineRequest(
                    request_id=internal_id,
                    prompt_token_ids=prompt_token_ids,
                    params=sample_params(params, index),
                    priority=priority,
                    cache_salt=cache_salt,
                    trace=trace,
                )
                self._add_sample(sink, request, request_id, index, group)
        except BaseException:
            self._abort_samples(sink)
            raise
        return RequestStream(sink, self._abort_samples)

    def check_health(self) -> None:
        """Raise EngineDeadError when the engine is gone or makes no progress."""
        if self._death is not None:
            raise self._make_death()
        silent_s = time.monotonic() - self._last_progress_s
        if silent_s > self._stall_timeout_s:
            raise EngineDeadError(
                f"the engine has made no progress for {silent_s:.0f} s "
                f"with {len(self._samples)} requests in flight"
            )

    async def wait_dead(self) -> EngineDeadError:
        """Wait until the engine dies and return the error; after `close` it never returns."""
        await self._died.wait()
        return self._make_death()

    async def close(self) -> None:
        """Abort what runs and stop the engine process; a second call waits for the first's end."""
        if self._process is None:
            return
        if not self._is_closing:
            self._is_closing = True
            self._death = EngineDeadError("the engine is shut down")
            self._fail_all(FinishReason.ABORT)
        await self._process.stop(timeout_s=SHUTDOWN_TIMEOUT_S)

    def _check_queue(self, n: int) -> None:
        """Raise when `n` more samples would exceed what may run and wait."""
        max_num_seqs = self._config.max_num_seqs or self.info.max_num_seqs
        capacity = max_num_seqs + self._config.max_num_queued_requests
        if n > capacity:
            raise RequestError(
                f"n is {n}, but at most {capacity} requests may run and wait; lower n or raise "
                "--max-num-queued-requests",
                param="n",
            )
        num_excess = len(self._samples) + n - capacity
        if num_excess <= 0:
            return
        if self._metrics is not None:
            self._metrics.on_rejected("queue_full")
        retry_after_s = self._estimate_wait_s(num_excess)
        raise QueueFullError(
            f"{len(self._samples)} requests run or wait, and at most {capacity} may; "
            f"retry in {retry_after_s} s",
            retry_after_s=retry_after_s,
        )

    def _estimate_wait_s(self, num_finished: int) -> int:
        """Estimate from the recent rate how long until `num_finished` more requests finish."""
        times = self._finish_times_s
        if not times:
            return 1
        # To now, not to the last one: an engine that slows down is seen to.
        mean_s = (time.monotonic() - times[0]) / len(times)
        return min(max(1, math.ceil(mean_s * num_finished)), _MAX_RETRY_AFTER_S)

    def _add_sample(
        self,
        sink: StreamSink,
        request: EngineRequest,
        request_id: str,
        index: int,
        group: SampleGroup | None,
    ) -> None:
        assert self._process is not None and self._outputs is not None
        self._outputs.add(
            request.request_id,
            index=index,
            prompt_token_ids=request.prompt_token_ids,
            params=request.params,
            output_request_id=request_id,
        )
        timer = None
        if self._metrics is not None:
            timer = self._metrics.start_request(
                len(request.prompt_token_ids), max_tokens=request.params.max_tokens, group=group
            )
        self._samples[request.request_id] = _Sample(sink, timer)
        sink.live_ids.add(request.request_id)
        self._process.send(AddRequest(request))

    def _on_message(self, message: FromEngine) -> None:
        """Handle what the engine process says; called by the event loop as it arrives."""
        if isinstance(message, StepOutputs):
            self._on_step(message)
        elif isinstance(message, LoadProgress):
            if self._on_progress is not None:
                self._on_progress(message)
        elif isinstance(message, EngineReady):
            if not self._ready.done():
                self._ready.set_result(message.info)
        else:
            self._failure = message

    def _on_step(self, message: StepOutputs) -> None:
        has_stepped = message.stats.num_steps_total != self._stats.num_steps_total
        if message.outputs or has_stepped or not self._samples:
            self._last_progress_s = time.monotonic()
        self._stats = message.stats
        stopped = [output.request_id for output in message.outputs if self._deliver(output)]
        if self._metrics is not None:
            self._metrics.on_stats(message.stats)
        if stopped:
            self._send_abort(stopped)

    def _deliver(self, output: TokenOutput) -> bool:
        """Hand one request's new tokens to its stream; return whether the engine must abort it."""
        sample = self._samples.get(output.request_id)
        if sample is None or self._outputs is None:
            return False
        if output.error is not None:
            self._fail_sample(output.request_id, sample, make_request_error(output))
            return False
        try:
            result, needs_abort = self._outputs.process(output)
        except Exception as error:
            sample.context.run(
                logger.exception, "the output of request %s failed", output.request_id
            )
            failure = NSAServeError(f"the request failed: internal error: {type(error).__name__}")
            self._fail_sample(output.request_id, sample, failure)
            return output.finish_reason is None
        if sample.timer is not None:
            sample.timer.on_tokens(
                len(output.token_ids),
                queued_s=output.queued_s,
                num_cached_tokens=output.num_prefix_hit_tokens,
                num_preemptions=output.num_preemptions,
            )
        if result is None:
            return False
        if result.finish_reason is not None:
            self._forget(output.request_id, sample, result.finish_reason)
            self._finish_times_s.append(time.monotonic())
        sample.sink.push(result)
        return needs_abort

    def _fail_sample(self, internal_id: str, sample: _Sample, error: NSAServeError) -> None:
        """End a request with an error, and with it the other samples of its call."""
        level = logging.INFO if isinstance(error, RequestError) else logging.ERROR
        sample.context.run(logger.log, level, "request %s failed: %s", internal_id, error)
        self._forget(internal_id, sample, FinishReason.ERROR)
        self._abort_samples(sample.sink)
        sample.sink.fail(error)

    def _forget(self, internal_id: str, sample: _Sample, reason: FinishReason) -> None:
        assert self._outputs is not None
        del self._samples[internal_id]
        self._outputs.abort(internal_id)
        sample.sink.live_ids.discard(internal_id)
        if sample.timer is not None:
            sample.timer.finish(reason)

    def _abort_samples(self, sink: StreamSink) -> None:
        """Abort the samples of a stream that are still running."""
        aborted = list(sink.live_ids)
        for internal_id in aborted:
            self._forget(internal_id, self._samples[internal_id], FinishReason.ABORT)
        if aborted:
            self._send_abort(aborted)

    def _send_abort(self, internal_ids: Iterable[str]) -> None:
        assert self._process is not None
        self._process.send(AbortRequests(list(internal_ids)))

    def _on_process_end(self, ended: "asyncio.Task[str]") -> None:
        """Tell everybody that the process is gone."""
        how = "its supervision was cancelled" if ended.cancelled() else ended.result()
        error = self._make_start_error(how)
        if not self._ready.done():
            self._ready.set_exception(error)
            return
        if self._is_closing or self._death is not None:
            return
        self._death = EngineDeadError(str(error))
        logger.error("%s", self._death)
        self._fail_all(FinishReason.ERROR)
        self._died.set()

    def _make_start_error(self, how: str) -> NSAServeError:
        """The engine's own last words if there are any, else how its process ended."""
        if self._failure is None:
            return EngineDeadError(f"the engine process is gone: {how}")
        kinds = (ModelError, CapacityError, ConfigError)
        kind = next((item for item in kinds if item.__name__ == self._failure.kind), None)
        if kind is None:
            return EngineDeadError(f"the engine failed: {self._failure.message}")
        return kind(self._failure.message)

    def _make_death(self) -> EngineDeadError:
        # A new one for each reader: a raised exception carries its traceback along.
        return EngineDeadError(str(self._death))

    def _fail_all(self, reason: FinishReason) -> None:
        for internal_id, sample in list(self._samples.items()):
            self._forget(internal_id, sample, reason)
            sample.sink.fail(self._make_death())
