"""The `nsa-serve` command. Flags of `serve` are derived from the config classes; chat, complete and
bench are the client's."""

import argparse
import logging
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, get_args, get_origin

import yaml
from annotated_types import Le
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nsa_http.config import (
    ServerConfig,
    Settings,
    all_fields,
    choices,
    did_you_mean,
    is_list,
    is_switch,
    make_settings,
)
from nsa_http.convert_command import CONVERT_FLAGS, add_convert_arguments, convert_command
from nsa_http.logs import configure_logging
from nsa_http.tls import own_client_context
from nsa_serve.errors import ConfigError, NSAServeError
from nsa_serve.version import __version__

_logger = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
# Of `nsa_client.cli`, which parses their flags; importing it takes longer than `health` does.
CLIENT_COMMANDS = {
    "chat": "converse in the terminal, or with lines from a pipe",
    "complete": "continue a text and write it as it comes",
    "bench": "send many requests and report latency and throughput",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in CLIENT_COMMANDS:
            return _client(arguments)
        parsed, unknown = make_parser().parse_known_args(arguments)
        if unknown:
            raise ConfigError(_describe_unknown(unknown, parsed.command))
        run = {"health": _health, "convert": convert_command}.get(parsed.command, _serve)
        return run(parsed)
    except ConfigError as error:
        _print_error(error)
        return EXIT_USAGE
    except NSAServeError as error:
        _print_error(error)
        return EXIT_FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; flags that are not given leave no attribute."""
    parser = _Parser(
        prog="nsa-serve",
        description="Serve a language model with Native Sparse Attention over an OpenAI API.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nsa-serve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="start the server",
        description="Start the server. Every flag is also a YAML key and an environment variable "
        "(--max-num-seqs is NSA_SERVE_MAX_NUM_SEQS); a flag wins over the environment, the "
        "environment over --config, --config over the default.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_serve_arguments(serve)
    health = commands.add_parser(
        "health", help="exit 0 when a server is healthy, else 1", allow_abbrev=False
    )
    health.add_argument(
        "--url", help="server to ask; default: the host and port that `serve` would use"
    )
    health.add_argument(
        "--timeout", type=float, default=5.0, help="seconds to wait (default: %(default)s)"
    )
    convert = commands.add_parser(
        "convert",
        help="rewrite a checkpoint in the documented layout",
        description="Write a checkpoint of any family that is served, or a dense Llama with an "
        "`nsa` section, as safetensors with canonical names (docs/models.md).",
        allow_abbrev=False,
    )
    add_convert_arguments(convert)
    for name, summary in CLIENT_COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    groups: dict[str, Any] = {}
    for name, field in all_fields().items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        title = str(extra["group"])
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        if name == "model":
            group.add_argument("model", nargs="?", metavar="MODEL", help=_help(field))
            group.add_argument("--model", dest="model_flag", metavar="MODEL", help="same as MODEL")
            continue
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, **_flag_options(field))
    config = parser.add_argument_group("Configuration")
    config.add_argument("--config", metavar="FILE", help="YAML file of settings")
    config.add_argument(
        "--print-config", action="store_true", help="print the settings as YAML and exit"
    )


def _flag_options(field: FieldInfo) -> dict[str, Any]:
    options: dict[str, Any] = {"help": _help(field)}
    if is_switch(field):
        return {**options, "action": argparse.BooleanOptionalAction}
    if is_list(field):
        return {**options, "nargs": "+", "metavar": "VALUE"}
    allowed = choices(field)
    return {**options, "metavar": "{" + ",".join(allowed) + "}" if allowed else _type_name(field)}


def _type_name(field: FieldInfo) -> str:
    members = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = members[0] if members else field.annotation
    # MemorySize is an int that is read from text.
    reads_text = any(isinstance(item, BeforeValidator) for item in field.metadata)
    if reads_text or get_origin(kind) is Annotated:
        return "SIZE"
    if kind is float:
        is_share = any(isinstance(item, Le) for item in field.metadata)
        return "SHARE" if is_share else "SECONDS"
    return "N" if kind is int else "TEXT"


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    default = field.default
    if default is PydanticUndefined or default is None or default in ("", []):
        return text
    return f"{text} (default: {default})"


def _serve(parsed: argparse.Namespace) -> int:
    flags = dict(vars(parsed))
    config_file = flags.pop("config", None)
    prints_config = flags.pop("print_config", False)
    flags.pop("command")
    if "model_flag" in flags:
        if "model" in flags:
            raise ConfigError("give the model once: as MODEL or as --model")
        flags["model"] = flags.pop("model_flag")
    configure_logging("info")
    settings = make_settings(flags, config_file)
    if prints_config:
        sys.stdout.write(yaml.safe_dump(settings.as_dict(), sort_keys=False))
        return EXIT_OK
    server = settings.server
    configure_logging(server.log_level, server.log_format)
    try:
        return _run_server(settings)
    except NSAServeError as error:
        if server.log_format == "text":
            raise
        _logger.critical("%s", error)
        return EXIT_FAILED


def _run_server(settings: Settings) -> int:
    # Here and not at the top: `--help` and `health` need neither FastAPI nor uvicorn.
    from nsa_http.server import run

    return run(settings)


def _client(arguments: Sequence[str]) -> int:
    from nsa_client.cli import main as client_main

    server = make_settings({}, None).server
    key = server.api_key[0].get_secret_value() if server.api_key else None
    return client_main(arguments, prog="nsa-serve", url=_local_url(server), api_key=key)


def _local_url(server: ServerConfig) -> str:
    """Return where a server with these settings answers on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(server.host, server.host)
    return f"{'http' if server.ssl_certfile is None else 'https'}://{host}:{server.port}"


def _health(parsed: argparse.Namespace) -> int:
    url, context = parsed.url, None
    if url is None:
        server = make_settings({}, None).server
        url = _local_url(server)
        context = own_client_context(server)
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url must start with http:// or https://, got {url!r}")
    try:
        with urllib.request.urlopen(
            f"{url.rstrip('/')}/health", timeout=parsed.timeout, context=context
        ):
            sys.stdout.write("healthy\n")
            return EXIT_OK
    except urllib.error.HTTPError as error:
        error.close()
        _print_error(f"{url} answers {error.code}")
    except OSError as error:
        _print_error(f"{url} does not answer: {error}")
    return EXIT_FAILED


def _describe_unknown(unknown: Sequence[str], command: str) -> str:
    first = unknown[0].partition("=")[0]
    if not first.startswith("-"):
        return f"unexpected argument: {first}"
    known = {"health": ["url", "timeout"], "convert": list(CONVERT_FLAGS)}.get(
        command, [*all_fields(), "config", "print_config"]
    )
    hint = did_you_mean(first, ["--" + name.replace("_", "-") for name in known])
    return f"unknown flag: {first}{hint}"


def _print_error(error: object) -> None:
    sys.stderr.write(f"nsa-serve: error: {error}\n")
