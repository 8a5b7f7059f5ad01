"""What the routes, the middleware and the server loop share: one object per server."""

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from nsa_http.config import ServerConfig
from nsa_http.errors import ModelNotFoundError
from nsa_serve.engine_client import EngineClient
from nsa_serve.errors import EngineDeadError
from nsa_serve.metrics import Metrics
from nsa_serve.structured.compiler import GrammarCompiler
from nsa_serve.structured.matcher import TokenTable, make_table
from nsa_serve.tokenizer import Tokenizer
from nsa_serve.version import __version__

_logger = logging.getLogger(__name__)

Phase = Literal["loading", "ready", "draining", "dead"]

MAX_LOGGED_FIELDS = 256
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True, eq=False)
class WorkHandle:
    """A request's running task. `is_aborted` tells it that the server cancelled, not the client."""

    task: asyncio.Task[Any]
    is_aborted: bool = False


@dataclass
class ServerState:
    """The server's state.

    engine: None until it has loaded. settings: all of them by name, secrets masked.
    sampling_defaults: parameters of requests that leave them out, beside OpenAI's. num_inflight:
    requests past the gate. work: tasks that generate, which the end of the drain timeout cancels.
    """

    config: ServerConfig
    metrics: Metrics
    served_names: list[str]
    allows_priority: bool = False
    engine: EngineClient | None = None
    phase: Phase = "loading"
    num_inflight: int = 0
    work: set[WorkHandle] = field(default_factory=set)
    settings: dict[str, Any] = field(default_factory=dict)
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    created_s: int = field(default_factory=lambda: int(time.time()))
    _logged_fields: set[str] = field(default_factory=set)

    def set_ready(self, engine: EngineClient) -> None:
        """Start to serve."""
        self.engine = engine
        self.phase = "ready"

    def require_engine(self) -> EngineClient:
        """Return the engine. Raises EngineDeadError when there is none."""
        if self.engine is None or self.phase == "dead":
            raise EngineDeadError("no engine is running")
        return self.engine

    def is_healthy(self) -> bool:
        """True when the engine is loaded and makes progress."""
        if self.engine is None or self.phase == "dead":
            return False
        try:
            self.engine.check_health()
        except EngineDeadError as error:
            _logger.error("health check failed: %s", error)
            return False
        return True

    def is_ready(self) -> bool:
        """True when new requests are taken."""
        return self.phase == "ready" and self.is_healthy()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.require_engine().tokenizer

    @cached_property
    def max_token_chars(self) -> int:
        """Most characters that one token of the vocabulary stands for."""
        tokenizer = self.tokenizer
        return max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))

    @cached_property
    def grammar_compiler(self) -> GrammarCompiler:
        """Compiles the grammars of structured output; its process starts with the first one."""
        return GrammarCompiler(self._make_token_table)

    def close(self) -> None:
        """End what the state started: the process that compiles grammars."""
        if "grammar_compiler" in self.__dict__:
            self.grammar_compiler.close()

    def _make_token_table(self) -> TokenTable:
        info = self.require_engine().info
        return make_table(self.tokenizer, info.vocab_size, info.eos_token_ids)

    @cached_property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: equal when model, version and number format are equal."""
        info = self.require_engine().info
        facts = (__version__, self.served_names[0], info.family, info.dtype, info.device)
        digest = hashlib.sha256("\0".join((*facts, str(info.num_parameters))).encode())
        return f"fp_{digest.hexdigest()[:10]}"

    def check_model(self, name: str | None) -> str:
        """Return the model name to answer with. Raises ModelNotFoundError for an unknown one."""
        if name is None:
            return self.served_names[0]
        if name not in self.served_names:
            raise ModelNotFoundError(name)
        return name

    def warn_unknown_fields(self, names: Iterator[str]) -> None:
        """Log each unknown request field once; the number of names is bounded."""
        for name in names:
            if name in self._logged_fields or len(self._logged_fields) >= MAX_LOGGED_FIELDS:
                continue
            self._logged_fields.add(name)
            _logger.warning("unknown request field ignored: %s", ascii(name[:64]))
            if len(self._logged_fields) == MAX_LOGGED_FIELDS:
                _logger.warning("further unknown request fields are ignored without a warning")

    @contextmanager
    def track(self, task: asyncio.Task[Any]) -> Iterator[WorkHandle]:
        """Let `abort_work` cancel `task` while the context is open."""
        handle = WorkHandle(task)
        self.work.add(handle)
        try:
            yield handle
        finally:
            self.work.discard(handle)

    def abort_work(self) -> int:
        """Cancel every generation; streams end with an error event. Returns how many there were."""
        handles = list(self.work)
        for handle in handles:
            handle.is_aborted = True
            handle.task.cancel()
        return len(handles)
