"""The life of the server: bind, load, serve, drain, exit.

The port is bound before the model loads, so that a conflict fails at once and probes get answers.
The first SIGTERM or SIGINT drains, the second ends what runs. Exit codes: 0 after a signal, 1 when
the engine could not start or died.
"""

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Generator
from typing import Protocol

import uvicorn
import uvloop

from nsa_http.app import create_app
from nsa_http.config import ServerConfig, Settings
from nsa_http.http_protocol import MAX_HEADER_BYTES, make_protocol
from nsa_http.report import ProgressBar, log_ready, log_settings
from nsa_http.state import ServerState
from nsa_http.stats import log_stats_forever
from nsa_http.tls import server_context
from nsa_serve.async_engine import AsyncEngine
from nsa_serve.collector import tame_collector
from nsa_serve.config import EngineConfig
from nsa_serve.engine_client import EngineClient
from nsa_serve.engine_supervisor import ENGINE_COMMAND
from nsa_serve.errors import EngineDeadError, NSAServeError
from nsa_serve.messages import LoadProgress
from nsa_serve.metrics import Metrics
from nsa_serve.model_source import served_name
from nsa_serve.sampling_defaults import load_sampling_defaults

_logger = logging.getLogger(__name__)

_ERROR_GRACE_S = 5.0
_CLOSE_GRACE_S = 2
_POLL_S = 0.05


class SupervisedEngine(EngineClient, Protocol):
    """An engine that says when it dies."""

    async def wait_dead(self) -> EngineDeadError:
        """Return the cause once the engine is dead."""
        ...


class StartEngine(Protocol):
    """How an engine is started (`AsyncEngine.start`)."""

    async def __call__(
        self,
        config: EngineConfig,
        *,
        on_progress: Callable[[LoadProgress], None] | None = None,
        metrics: Metrics | None = None,
    ) -> SupervisedEngine: ...


def run(settings: Settings, *, start_engine: StartEngine | None = None) -> int:
    """Serve until a signal or the engine's death; return the exit code.

    start_engine: default is an engine process that logs as this process does. Raises NSAServeError
    when the port cannot be bound or the engine cannot start, ConfigError for certificates.
    """
    if start_engine is None:
        start_engine = functools.partial(AsyncEngine.start, command=_engine_command(settings))
    tls = server_context(settings.server)
    sock = bind(settings.server)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Lifetime(settings, sock, start_engine, tls).run())
    finally:
        sock.close()


def _engine_command(settings: Settings) -> tuple[str, ...]:
    server = settings.server
    return (*ENGINE_COMMAND, "--log-format", server.log_format, "--log-level", server.log_level)


def bind(config: ServerConfig) -> socket.socket:
    """Bind the listening socket. Raises NSAServeError naming the address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise NSAServeError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error}; "
            "choose another with --host and --port"
        ) from None


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which would end streams and the exit code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _Lifetime:
    """One run of the server."""

    def __init__(
        self,
        settings: Settings,
        sock: socket.socket,
        start_engine: StartEngine,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._settings = settings
        self._config = settings.server
        self._start_engine = start_engine
        self._sock = sock
        self._tls = tls
        names = self._config.served_model_name or [served_name(settings.engine)]
        self._state = ServerState(
            self._config,
            Metrics(names[0], has_vllm_names=self._config.metrics_compat == "vllm"),
            names,
            allows_priority=settings.engine.scheduling_policy == "priority",
            settings=settings.as_dict(),
        )
        self._num_signals = 0
        self._signalled = asyncio.Event()

    async def run(self) -> int:
        start_s = time.monotonic()
        log_settings(self._settings.non_default())
        self._install_signal_handlers()
        async with self._listening():
            engine = await self._load()
            if engine is None:
                return 0
            try:
                if self._config.generation_config == "auto":
                    defaults = await asyncio.to_thread(
                        load_sampling_defaults, self._settings.engine
                    )
                    self._state.sampling_defaults = defaults
                tame_collector(rarer=1)
                self._state.set_ready(engine)
                log_ready(
                    engine.info,
                    url=self._url(),
                    model=self._state.served_names[0],
                    sampling_defaults=self._state.sampling_defaults,
                    has_key=bool(self._config.api_key),
                    total_s=time.monotonic() - start_s,
                )
                return await self._supervise(engine)
            finally:
                self._state.close()
                await engine.close()

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        config = uvicorn.Config(
            create_app(self._state),
            http=make_protocol(self._config.request_read_timeout),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            root_path=self._config.root_path,
            timeout_keep_alive=self._config.keep_alive_timeout,
            timeout_graceful_shutdown=_CLOSE_GRACE_S,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        config.load()
        config.ssl = self._tls
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[self._sock]))
        try:
            yield
        finally:
            server.should_exit = True
            await serving

    async def _load(self) -> SupervisedEngine | None:
        """Start the engine; None when a signal came first. Raises what the engine raises."""
        with ProgressBar() as progress:
            loading = asyncio.ensure_future(
                self._start_engine(
                    self._settings.engine,
                    on_progress=progress.update,
                    metrics=self._state.metrics,
                )
            )
            signalled = asyncio.create_task(self._signalled.wait())
            await asyncio.wait({loading, signalled}, return_when=asyncio.FIRST_COMPLETED)
            signalled.cancel()
            if loading.done():
                return loading.result()
            loading.cancel()
            await asyncio.wait({loading})
            if not loading.cancelled() and loading.exception() is None:
                await loading.result().close()
            return None

    async def _supervise(self, engine: SupervisedEngine) -> int:
        """Wait for a signal or the engine's death and wind down; return the exit code."""
        stats = asyncio.create_task(log_stats_forever(self._state))
        died = asyncio.create_task(engine.wait_dead())
        signalled = asyncio.create_task(self._signalled.wait())
        try:
            await asyncio.wait({died, signalled}, return_when=asyncio.FIRST_COMPLETED)
            if not died.done():
                await self._drain(died)
                if not died.done():
                    return 0
            self._state.phase = "dead"
            _logger.error("the engine died: %s", died.result())
            await self._wait_idle(_ERROR_GRACE_S)
            return 1
        finally:
            tasks = (stats, died, signalled)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _drain(self, died: "asyncio.Task[EngineDeadError]") -> None:
        """Refuse new requests; give running ones the timeout, or until the second signal."""
        self._state.phase = "draining"
        timeout_s = self._config.shutdown_timeout
        num_inflight = self._state.num_inflight
        if num_inflight:
            _logger.info(
                "draining %d requests for at most %g s; a second signal ends them",
                num_inflight,
                timeout_s,
            )
        await self._wait_idle(timeout_s, stop=lambda: self._num_signals > 1 or died.done())
        if self._state.num_inflight and not died.done():
            _logger.warning("aborted %d requests", self._state.abort_work())
            await self._wait_idle(_ERROR_GRACE_S)

    async def _wait_idle(self, timeout_s: float, *, stop: Callable[[], bool] | None = None) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self._state.num_inflight and time.monotonic() < deadline_s:
            if stop is not None and stop():
                return
            await asyncio.sleep(_POLL_S)

    def _install_signal_handlers(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._signalled.set()

    def _url(self) -> str:
        host, port = self._sock.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        netloc = f"[{host}]" if ":" in host else host
        # Without the root path, which is a proxy's to take off.
        return f"{'http' if self._tls is None else 'https'}://{netloc}:{port}"
