"""GET /: a page to try the model, from memory; the page needs no key, the API it calls does."""

from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
# Path -> file and media type. The page names the others relative to itself, so that it works
# behind a proxy with a path prefix.
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/playground/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/playground/stream.js": ("stream.js", "text/javascript; charset=utf-8"),
    "/playground/trace.js": ("trace.js", "text/javascript; charset=utf-8"),
    "/playground/panel.js": ("panel.js", "text/javascript; charset=utf-8"),
    "/playground/heatmap.js": ("heatmap.js", "text/javascript; charset=utf-8"),
    "/playground/style.css": ("style.css", "text/css; charset=utf-8"),
}
PLAYGROUND_PATHS = frozenset(_FILES)


def add_playground(app: FastAPI) -> None:
    """Serve the page and its files."""
    for path, (name, media_type) in _FILES.items():
        _add_file(app, path, files(__name__).joinpath(name).read_bytes(), media_type)


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    headers = {**_HEADERS, "Content-Type": media_type}

    # No part of the API: not in its schema.
    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)
    async def playground_file() -> Response:
        """Return a file of the page."""
        return Response(content, headers=headers)
