"""docs/serving.md against the code: each route and field has a row, each row a test that exists."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import httpx
import pytest

from nsa_http.unsupported import REFUSED_FIELDS

ROOT = Path(__file__).parents[2]
# The letters of the table's `routes` column.
LETTERS = {
    "C": "/v1/completions",
    "H": "/v1/chat/completions",
    "R": "/v1/responses",
    "T": "/tokenize",
    "D": "/detokenize",
}


def section() -> str:
    text = (ROOT / "docs" / "serving.md").read_text()
    found = re.search(r"^## Against vLLM and SGLang$(.*?)(^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def rows(num_cells: int) -> list[list[str]]:
    """The rows of the table with so many columns, its header left out."""
    lines = [line for line in section().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) == num_cells]


@cache
def test_names(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, functions))


test_names.__test__ = False  # type: ignore[attr-defined]


async def test_every_route_has_a_row(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    routes = {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
    described = [route for row in rows(5) for route in re.findall(r"`([A-Z]+ [^`]+)`", row[0])]
    assert sorted(described) == sorted(routes)


async def test_every_field_has_one_row(client: httpx.AsyncClient) -> None:
    spec = (await client.get("/openapi.json")).json()
    fields = set()
    for letter, path in LETTERS.items():
        content = spec["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = content["schema"]["$ref"].rpartition("/")[2]
        fields |= {(field, letter) for field in spec["components"]["schemas"][name]["properties"]}
    described = [(row[0].strip("`"), letter) for row in rows(6) for letter in row[1].split()]
    assert sorted(described) == sorted(fields)


def test_every_row_names_a_test_that_exists() -> None:
    cells = [row[-1] for row in [*rows(5), *rows(6)]]
    assert cells
    for cell in cells:
        path, _, name = cell.strip("`").partition("::")
        assert name in test_names(path), cell


def test_every_refused_field_is_listed() -> None:
    listed = section()
    taken = {row[0].strip("`") for row in rows(6)}
    for field in REFUSED_FIELDS - taken:
        assert f"`{field}`" in listed, field


def test_differences_from_vllm_all_have_a_reason() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "referee.json").read_text())
    assert result["num_cases"] >= 120
    unexplained = [name for name, entry in result["differences"].items() if entry["reason"] is None]
    assert unexplained == []


@pytest.mark.parametrize("begin", ["<!-- referee:begin", "<!-- referee:end"])
def test_the_table_of_differences_is_generated(begin: str) -> None:
    assert section().count(begin) == 1
