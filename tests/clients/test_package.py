"""The package keeps to itself: what it exports, and what it may import."""

import ast
import inspect
import sys
from pathlib import Path

import nsa_client


def test_all_lists_every_public_name() -> None:
    public = {
        name
        for name, value in vars(nsa_client).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(nsa_client.__all__) == public


def test_it_imports_httpx_and_the_standard_library_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"httpx", "nsa_client"}
    for path in Path(inspect.getfile(nsa_client)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            assert {name.partition(".")[0] for name in names} <= allowed, path.name
