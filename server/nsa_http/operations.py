"""Routes for operators: probes, metrics, versions, what the server is and does."""

import importlib.metadata
import platform
from typing import Any

import msgspec
import orjson
from fastapi import FastAPI
from starlette.responses import Response

from nsa_http import openapi
from nsa_http.state import ServerState
from nsa_serve.metrics import CONTENT_TYPE
from nsa_serve.version import __version__

# Their versions change what is computed, or how fast.
_PACKAGES = ("torch", "triton", "fastapi", "uvicorn", "pydantic", "tokenizers", "llguidance")


def add_probe_routes(app: FastAPI, state: ServerState) -> None:
    """Add what load balancers and orchestrators ask."""
    responses = openapi.probe()

    @app.get("/health", response_model=None, responses=responses)
    @app.get("/ping", response_model=None, responses=responses)
    async def health() -> Response:
        """Answer 200 when the engine is loaded and makes progress, else 503."""
        return _status(state.is_healthy())

    @app.get("/ready", response_model=None, responses=responses)
    @app.get("/health/ready", response_model=None, responses=responses)
    async def ready() -> Response:
        """Answer 200 when new requests are taken: healthy and not draining."""
        return _status(state.is_ready())

    @app.get("/health/live", response_model=None, responses=responses)
    async def live() -> Response:
        """Answer 200 unless the server must be restarted; loading and draining are alive."""
        return _status(state.engine is None or state.is_healthy())


def add_operator_routes(app: FastAPI, state: ServerState) -> None:
    """Add what tells people and dashboards about the server."""
    state.metrics.ready.set_function(lambda: float(state.is_ready()))

    @app.get("/version", response_model=None, responses=openapi.query(openapi.VersionAnswer))
    async def version() -> Response:
        """Return the server's version."""
        return json_response({"version": __version__})

    @app.get("/load", response_model=None, responses=openapi.query(openapi.LoadAnswer, 503))
    async def load() -> Response:
        """Return how many requests are being answered, this one not counted."""
        return json_response({"server_load": state.num_inflight - 1})

    @app.get("/server_info", response_model=None, responses=openapi.query(openapi.ServerInfo))
    async def server_info() -> Response:
        """Return settings (secrets masked), versions, and what was loaded."""
        return json_response(describe_server(state))

    @app.get(
        "/metrics",
        response_model=None,
        response_class=Response,
        responses=openapi.text(),
    )
    async def metrics() -> Response:
        """Return the Prometheus metrics."""
        return Response(state.metrics.render(), headers={"content-type": CONTENT_TYPE})


def describe_server(state: ServerState) -> dict[str, Any]:
    """Return what `/server_info` says; model and cache are null while the engine loads."""
    content: dict[str, Any] = {
        "version": __version__,
        "phase": state.phase,
        "served_model_names": state.served_names,
        "settings": state.settings,
        "versions": {"python": platform.python_version(), **_package_versions()},
        "model": None,
        "cache": None,
        "memory": None,
        "startup_s": None,
    }
    if state.engine is not None:
        info = state.engine.info
        content["model"] = {
            "family": info.family,
            "dtype": info.dtype,
            "device": info.device,
            "num_parameters": info.num_parameters,
            "weight_bytes": info.weight_bytes,
            "quantization": info.quantization,
            "vocab_size": info.vocab_size,
            "max_model_len": info.max_model_len,
            "sampling_defaults": state.sampling_defaults,
        }
        content["cache"] = {
            "dtype": info.cache_dtype or info.dtype,
            "page_size": info.page_size,
            "num_pages": info.num_pages,
            "components": {part.name: part.total_bytes for part in info.cache},
        }
        content["memory"] = None if info.memory is None else msgspec.to_builtins(info.memory)
        content["startup_s"] = info.phase_s
    return content


def json_response(content: dict[str, Any]) -> Response:
    """Return a 200 with this body."""
    return Response(orjson.dumps(content), media_type="application/json")


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _status(is_good: bool) -> Response:
    if is_good:
        return json_response({"status": "ok"})
    return Response(
        orjson.dumps({"status": "unavailable"}),
        503,
        {"Retry-After": "5"},
        media_type="application/json",
    )
