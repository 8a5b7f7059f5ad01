"""Settings of the HTTP server, and how flags, environment, YAML and defaults become one config.

Both `EngineConfig` and `ServerConfig` are plain field lists; flags, environment variables, YAML
keys and the help text are all derived from them. Precedence: flag, environment, YAML, default.
"""

import difflib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from nsa_serve.config import EngineConfig, MemorySize, make_config, read_environment
from nsa_serve.errors import ConfigError
from nsa_serve.log_format import LogFormat

_logger = logging.getLogger(__name__)


def _field(default: Any, group: str, description: str, **kwargs: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"group": group}, **kwargs)


def _read_json_list(value: object) -> object:
    """Take a JSON list as one value too: vLLM's flags have that form."""
    if isinstance(value, list) and value and str(value[0]).startswith("["):
        try:
            # The environment's value was split at its commas.
            return json.loads(",".join(map(str, value)))
        except ValueError:
            raise ValueError("expected values, or one JSON list of them") from None
    return value


StrList = Annotated[list[str], BeforeValidator(_read_json_list)]


class ServerConfig(BaseModel):
    """Everything that decides how the HTTP server listens and answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = _field("127.0.0.1", "HTTP", "address to listen on; 0.0.0.0 is every interface")
    port: int = _field(8000, "HTTP", "port to listen on; 0 picks a free one", ge=0, le=65535)
    root_path: str = _field(
        "", "HTTP", "path prefix under which a proxy forwards requests, such as /llm"
    )
    served_model_name: list[str] = _field(
        [], "HTTP", "names that requests may give as `model`; default: the model argument"
    )
    ssl_certfile: str | None = _field(
        None, "TLS", "PEM file of the server's certificate chain; with it the server speaks https"
    )
    ssl_keyfile: str | None = _field(
        None, "TLS", "PEM file of the certificate's key; default: it is in ssl_certfile"
    )
    ssl_ca_certs: str | None = _field(
        None,
        "TLS",
        "PEM file of authorities; clients must then present a certificate that one has signed",
    )
    allowed_origins: StrList = _field(
        [], "CORS", "web sites whose pages may call from a browser, such as https://a.b; * is all"
    )
    allowed_methods: StrList = _field(["*"], "CORS", "methods that such pages may use")
    allowed_headers: StrList = _field(["*"], "CORS", "request headers that such pages may send")
    allow_credentials: bool = _field(
        False, "CORS", "let such pages send cookies and client certificates"
    )
    api_key: list[SecretStr] = _field(
        [],
        "HTTP",
        "keys that requests must bear; without any, everybody may call. "
        "Prefer the environment variable: arguments are visible in the process list",
    )
    max_request_bytes: MemorySize = _field(
        32 * 2**20, "HTTP", "longest request body, such as 32MiB; more is answered 413", gt=0
    )
    request_read_timeout: float = _field(
        60.0, "HTTP", "seconds a client may take to send its headers, and its body", gt=0
    )
    response_write_timeout: float = _field(
        60.0, "HTTP", "seconds a client may leave a chunk of a stream unread", gt=0
    )
    keep_alive_timeout: int = _field(5, "HTTP", "seconds an idle connection stays open", ge=1)
    sse_keep_alive_interval: float = _field(
        15.0, "HTTP", "seconds of silence after which a stream gets a comment; 0 is never", ge=0
    )
    shutdown_timeout: float = _field(
        30.0, "HTTP", "seconds that running requests get to end after SIGTERM", ge=0
    )
    tool_call_parser: Literal["auto", "hermes", "llama3_json"] = _field(
        "auto",
        "HTTP",
        "form in which the model writes tool calls; auto looks into its chat template",
    )
    reasoning_parser: Literal["auto", "think", "none"] = _field(
        "auto",
        "HTTP",
        "tell <think> blocks from the answer: always, never, or (auto) when the chat template "
        "mentions them",
    )
    generation_config: Literal["auto", "none"] = _field(
        "auto",
        "HTTP",
        "sampling defaults: those of the checkpoint's generation_config.json, or OpenAI's",
    )
    enable_trace: bool = _field(
        True, "HTTP", "allow nsa_trace: requests may ask which blocks their tokens selected"
    )
    playground: bool = _field(True, "HTTP", "serve a page to try the model, at /")
    log_level: Literal["debug", "info", "warning", "error"] = _field(
        "info", "Logging", "least severe message to log"
    )
    log_format: LogFormat = _field(
        "text", "Logging", "lines of text, or one JSON object a line, from both processes"
    )
    log_requests: bool = _field(True, "Logging", "log one line for each request (never its text)")
    log_prompts: bool = _field(
        False, "Logging", "log what clients send as prompts: private text may end up in the log"
    )
    metrics_compat: Literal["vllm", "none"] = _field(
        "vllm", "Logging", "also export metrics under vLLM's names, or only under our own"
    )

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, path: str) -> str:
        if path and (not path.startswith("/") or path.endswith("/")):
            raise ValueError("expected a path that starts with / and does not end with one")
        return path

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ValueError("ssl_keyfile and ssl_ca_certs need ssl_certfile")
        if self.allowed_origins:
            if self.allow_credentials and "*" in self.allowed_origins:
                raise ValueError("allow_credentials needs allowed_origins by name, not *")
        elif self.allow_credentials or [*self.allowed_methods, *self.allowed_headers] != ["*", "*"]:
            raise ValueError(
                "allowed_methods, allowed_headers and allow_credentials need allowed_origins"
            )
        return self


@dataclass(frozen=True, slots=True)
class Settings:
    """The two configs, and the names that were set by somebody."""

    engine: EngineConfig
    server: ServerConfig
    names_set: frozenset[str]

    def non_default(self) -> dict[str, Any]:
        """Values that were set, by name; secrets are masked."""
        return {name: value for name, value in self.as_dict().items() if name in self.names_set}

    def as_dict(self) -> dict[str, Any]:
        """All values by name, as plain data; secrets are masked."""
        return {
            **self.engine.model_dump(mode="json"),
            **self.server.model_dump(mode="json"),
        }


def all_fields() -> dict[str, FieldInfo]:
    """Every setting by name, in the order in which help shows them."""
    return {**EngineConfig.model_fields, **ServerConfig.model_fields}


def is_list(field: FieldInfo) -> bool:
    """True when a setting takes several values."""
    return get_origin(field.annotation) is list


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values a Literal setting allows, None aside; empty for any other."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if get_origin(kind) is Literal:
            return get_args(kind)
    return ()


def is_switch(field: FieldInfo) -> bool:
    """True when a setting is on or off, or decided by the engine when it is neither."""
    return field.annotation in (bool, bool | None)


def make_settings(flags: Mapping[str, Any], config_file: str | None) -> Settings:
    """Merge flags, environment and YAML into validated configs. Raises ConfigError."""
    values: dict[str, Any] = {}
    if config_file is not None:
        values.update(read_yaml(config_file))
    values.update(_environment_values())
    values.update(flags)
    engine = {name: value for name, value in values.items() if name in EngineConfig.model_fields}
    server = {name: value for name, value in values.items() if name in ServerConfig.model_fields}
    return Settings(
        make_config(EngineConfig, engine), make_config(ServerConfig, server), frozenset(values)
    )


def read_yaml(path: str) -> dict[str, Any]:
    """Read a settings file: flag names (with - or _) to values. Raises ConfigError."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the config file {path} is not YAML: {reason}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"the config file {path} must map flag names to values, got {type(loaded).__name__}"
        )
    fields = all_fields()
    values = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            hint = did_you_mean(name, fields)
            raise ConfigError(f"the config file {path} has an unknown key: {key}{hint}")
        # A single value where several are allowed is a list of one, as on the command line.
        single = is_list(fields[name]) and not isinstance(value, list)
        values[name] = [value] if single else value
    return values


def _environment_values() -> dict[str, Any]:
    values: dict[str, Any] = {**read_environment(EngineConfig), **read_environment(ServerConfig)}
    for name, field in all_fields().items():
        if name in values and is_list(field):
            values[name] = [part.strip() for part in values[name].split(",") if part.strip()]
    # Kubernetes sets <SERVICE>_PORT for every service: one called nsa-serve collides with ours.
    if str(values.get("port", "")).startswith("tcp://"):
        _logger.warning("NSA_SERVE_PORT=%s is a Kubernetes service link: ignored", values["port"])
        del values["port"]
    return values


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
