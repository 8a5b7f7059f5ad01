"""The outputs of one request on their way from the engine's callback to whoever reads them."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from nsa_serve.errors import NSAServeError
from nsa_serve.fold import fold_by_index
from nsa_serve.request import RequestOutput

# Outputs a sample that its reader has not taken may hold before they are folded into one.
_MAX_UNREAD_OUTPUTS = 64


class RequestStream(AsyncIterator[RequestOutput]):
    """The outputs of one `generate` call, its samples interleaved.

    A reader that lags gets fewer, longer outputs. Closing the stream, cancelling a read or
    dropping the stream aborts what is unfinished.
    """

    def __init__(self, sink: "StreamSink", abort: Callable[["StreamSink"], None]) -> None:
        self._sink = sink
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._folded: deque[RequestOutput] = deque()

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestOutput:
        sink = self._sink
        while not self._folded:
            if sink.unread:
                unread, sink.unread = sink.unread, []
                self._folded.extend(unread if len(unread) == 1 else fold_by_index(unread))
            elif sink.error is not None:
                error, sink.error = sink.error, None
                raise error
            elif sink.live_ids:
                await self._wait()
            else:
                raise StopAsyncIteration
        return self._folded.popleft()

    async def aclose(self) -> None:
        """Abort what is unfinished; nothing more is read."""
        self._abort(self._sink)
        self._sink.discard()
        self._folded.clear()

    async def _wait(self) -> None:
        waiter = self._loop.create_future()
        self._sink.waiter = waiter
        try:
            await waiter
        except asyncio.CancelledError:
            await self.aclose()
            raise
        finally:
            self._sink.waiter = None

    def __del__(self) -> None:
        # The collector may run in any thread; the loop's own is the one that may abort.
        if self._sink.live_ids and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._abort, self._sink)


class StreamSink:
    """The engine's side of a stream.

    The engine holds this and not the stream, so that a stream nobody reads can be collected.
    """

    __slots__ = ("_max_unread", "error", "live_ids", "unread", "waiter")

    def __init__(self, num_samples: int) -> None:
        self._max_unread = _MAX_UNREAD_OUTPUTS * num_samples
        self.unread: list[RequestOutput] = []
        self.error: NSAServeError | None = None
        self.waiter: asyncio.Future[None] | None = None
        # Internal ids of the samples that are still running.
        self.live_ids: set[str] = set()

    def push(self, output: RequestOutput) -> None:
        """Hand an output to the reader."""
        self.unread.append(output)
        if len(self.unread) > self._max_unread:
            self.unread = fold_by_index(self.unread)
        self.wake()

    def fail(self, error: NSAServeError) -> None:
        """Raise `error` in the reader once it has read what came before."""
        self.error = error
        self.wake()

    def discard(self) -> None:
        """Drop what was not read."""
        self.unread.clear()
        self.error = None
        self.wake()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
