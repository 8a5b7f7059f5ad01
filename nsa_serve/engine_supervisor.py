"""The engine process as its parent sees it: start it, talk to it, notice its end, stop it."""

import asyncio
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from nsa_serve.config import child_environment
from nsa_serve.ipc import ChannelProtocol
from nsa_serve.messages import FromEngine, Shutdown, ToEngine

ENGINE_COMMAND = (sys.executable, "-m", "nsa_serve.engine_process")

# A process that closed its end of the channel has this long to exit by itself.
_EXIT_GRACE_S = 1.0
_NUM_TAIL_LINES = 5
_TAIL_BYTES = 4096


class EngineProcess:
    """A running engine process. `spawn` makes one; nothing of it outlives `stop`.

    `ended` is done when the process is gone and reaped; its result says how it ended.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._channel: ChannelProtocol | None = None
        self._channel_end: asyncio.Future[Exception | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._tail = b""
        self._relay = asyncio.create_task(self._relay_log())
        self.ended: asyncio.Task[str] | None = None

    @classmethod
    async def spawn(
        cls, command: Sequence[str], on_message: Callable[[FromEngine], None]
    ) -> "EngineProcess":
        """Start `command` with the number of its end of the channel as last argument."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    env=child_environment(),
                )
            except BaseException:
                ours.close()
                raise
        self = cls(process)
        loop = asyncio.get_running_loop()
        try:
            _, self._channel = await loop.create_unix_connection(
                lambda: ChannelProtocol(on_message, self._on_channel_end), sock=ours
            )
        except BaseException:
            ours.close()
            self._kill()
            await process.wait()
            raise
        self.ended = asyncio.create_task(self._wait_for_end())
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue a message; to a process that is gone it is lost."""
        assert self._channel is not None
        self._channel.send(message)

    def send_bytes(self, payload: bytes) -> None:
        """Queue a frame that is no message: the config."""
        assert self._channel is not None
        self._channel.send_bytes(payload)

    async def stop(self, *, timeout_s: float) -> None:
        """Ask the process to leave, kill it after `timeout_s`, and reap it."""
        assert self.ended is not None
        self.send(Shutdown())
        try:
            await asyncio.wait({self.ended}, timeout=timeout_s)
        finally:
            self._kill()
        await self.ended

    def _on_channel_end(self, error: Exception | None) -> None:
        if not self._channel_end.done():
            self._channel_end.set_result(error)

    async def _wait_for_end(self) -> str:
        """Wait until the process or its channel ends, clean up both, and say how it ended."""
        exited = asyncio.create_task(self._process.wait())
        either: set[asyncio.Future[Any]] = {exited, self._channel_end}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        was_killed = False
        if not (await asyncio.wait({exited}, timeout=_EXIT_GRACE_S))[0]:
            was_killed = True
            self._kill()
        exit_code = await exited
        # A grandchild may hold the pipe open: the log is then what came until now.
        await asyncio.wait({self._relay}, timeout=_EXIT_GRACE_S)
        self._relay.cancel()
        if self._channel is not None:
            self._channel.abort()
        error = await self._channel_end
        if error is not None:
            return f"{error}; it was stopped"
        if was_killed:
            return "it closed its channel and did not exit; it was killed"
        return _describe_exit(exit_code) + self._describe_tail()

    def _kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    async def _relay_log(self) -> None:
        """Pass the process's log on to our own standard error, and remember its end."""
        stream = self._process.stdout
        assert stream is not None
        while data := await stream.read(2**16):
            self._tail = (self._tail + data)[-_TAIL_BYTES:]
            sys.stderr.write(data.decode("utf-8", "replace"))

    def _describe_tail(self) -> str:
        lines = self._tail.decode("utf-8", "replace").split("\n")
        tail = [line.strip() for line in lines if line.strip()][-_NUM_TAIL_LINES:]
        return f"; its log ends: {' | '.join(tail)}" if tail else ""


def _describe_exit(exit_code: int) -> str:
    if exit_code < 0:
        return f"it was ended by signal {-exit_code}"
    return f"it exited with code {exit_code}"
