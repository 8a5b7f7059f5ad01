"""The house: exports, packages, what an import loads, and calls that no package may make."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "nsa_serve": ROOT / "nsa_serve",
    "nsa_kernels": ROOT / "kernels" / "nsa_kernels",
    "nsa_http": ROOT / "server" / "nsa_http",
    "nsa_client": ROOT / "clients" / "nsa_client",
}
FILES = [file for folder in PACKAGES.values() for file in sorted(folder.rglob("*.py"))]
# Each of them runs code that it reads from data.
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "numpy.load", "np.load"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def banned_uses(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            found += [
                f"{node.module}.{item.name}"
                for item in node.names
                if f"{node.module}.{item.name}" in BANNED_CALLS
            ]
        elif isinstance(node, ast.Call) and dotted(node.func) in BANNED_CALLS:
            found.append(dotted(node.func))
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append("trust_remote_code")
        found += [name for name in names if name.split(".")[0] in BANNED_MODULES]
    return found


def public_names(tree: ast.Module) -> set[str]:
    """Names that a package's __init__ imports or defines for its users."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING":
            names |= public_names(ast.Module(node.body, []))
    return {name for name in names if not name.startswith("_") or name == "__version__"}


@pytest.mark.parametrize("package", ["nsa_serve", "nsa_client"])
def test_all_lists_exactly_the_exports(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse((PACKAGES[package] / "__init__.py").read_text())
    exports = public_names(tree) - {"TYPE_CHECKING", "Any"}
    assert sorted(module.__all__) == sorted(exports)
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_an_unknown_export_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        importlib.import_module("nsa_serve").Motor  # noqa: B018


@pytest.mark.parametrize("folder", ["kernels", "server", "clients"])
def test_project_folders_are_no_packages(folder: str) -> None:
    """`kernels` and `clients` are names of other people's packages."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


@pytest.mark.parametrize(
    "statement",
    [
        "import nsa_serve",
        "from nsa_serve import SamplingParams, EngineConfig, RequestOutput",
        "import nsa_serve.async_engine",
        "import nsa_http, nsa_http.server, nsa_http.cli",
        "import nsa_client",
    ],
)
def test_the_api_side_does_not_load_torch(statement: str) -> None:
    path = os.pathsep.join(str(folder.parent) for folder in PACKAGES.values())
    code = f"{statement}; import sys; print(sorted({{'torch', 'triton'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_nothing_runs_code_from_data() -> None:
    assert len(FILES) > 50
    uses = {str(file.relative_to(ROOT)): banned_uses(file.read_text()) for file in FILES}
    assert {name: found for name, found in uses.items() if found} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "from torch import load",
        "f(trust_remote_code=True)",
        "exec('x')",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert banned_uses(source)
