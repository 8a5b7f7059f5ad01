"""The package keeps to itself: its version, its exports, its imports, and the wheel made of it."""

import ast
import inspect
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nsa_client
import nsa_serve
from nsa_client.cli import COMMANDS
from nsa_http.cli import CLIENT_COMMANDS

ROOT = Path(__file__).parents[2]
# What the wheel may import: httpx and what httpx needs.
INSTALLED = {"httpx", "httpcore", "anyio", "certifi", "h11", "idna", "typing_extensions"}
# Run with the wheel alone on the path: everything else that is installed here cannot be imported.
IMPORT_ALONE = f"""
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in {sorted(INSTALLED | {"nsa_client"})}:
            raise ModuleNotFoundError("not installed: " + name, name=name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
import nsa_client
from nsa_client.cli import main
print(nsa_client.__file__)
sys.exit(main(sys.argv[2:]))
"""


def test_all_lists_every_public_name() -> None:
    public = {
        name
        for name, value in vars(nsa_client).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(nsa_client.__all__) == public | {"__version__"}


def test_client_and_server_have_one_version_and_one_list_of_commands() -> None:
    assert nsa_client.__version__ == nsa_serve.__version__
    assert dict(COMMANDS) == CLIENT_COMMANDS


def test_it_imports_httpx_and_the_standard_library_only() -> None:
    for path in Path(inspect.getfile(nsa_client)).parent.glob("*.py"):
        allowed = set(sys.stdlib_module_names) | {"httpx", "nsa_client"}
        if path.name == "plot.py":
            allowed.add("matplotlib")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            assert {name.partition(".")[0] for name in names} <= allowed, path.name


def test_the_wheel_needs_httpx_alone(tmp_path: Path) -> None:
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    folder = str(ROOT / "clients")
    subprocess.run(
        [sys.executable, *build, "--wheel-dir", str(tmp_path), folder],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    (wheel,) = tmp_path.glob("nsa_client-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        archive.extractall(tmp_path / "alone")
    assert "nsa_client/py.typed" in names
    assert not [name for name in names if not name.startswith("nsa_client")]
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert needed == [
        "Requires-Dist: httpx>=0.27",
        "Requires-Dist: matplotlib>=3.9; extra == 'plot'",
    ]

    command = ["bench", "--plot", str(tmp_path / "x.png")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", IMPORT_ALONE, str(tmp_path / "alone"), *command],
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(str(tmp_path / "alone")), done.stderr
    # The extra is missing there, and the error says what to do.
    assert "needs matplotlib; install it: pip install matplotlib" in done.stderr
    assert done.returncode == 2


def test_both_projects_ask_for_the_same() -> None:
    server = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    client = tomllib.loads((ROOT / "clients/pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(client["dependencies"]) <= set(server["dependencies"])
    assert client["optional-dependencies"]["plot"] == server["optional-dependencies"]["plot"]
    assert client["scripts"]["nsa-client"] == server["scripts"]["nsa-client"]
    assert client["requires-python"] == server["requires-python"]
