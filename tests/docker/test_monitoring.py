"""Dashboard, alerts and scrape configuration agree with what the server exports."""

import asyncio
import importlib
import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from nsa_http.app import create_app
from tests.docker.promql import grouping_labels, matchers, series_names
from tests.server.fake_engine import FakeEngine, make_state

FOLDER = Path(__file__).parents[2] / "docker" / "monitoring"
DASHBOARD = json.loads(
    (FOLDER / "grafana" / "dashboards" / "nsa-serve.json").read_text(encoding="utf-8")
)
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
# Prometheus adds these to what it scrapes.
SCRAPE_LABELS = {"instance", "job"}
SCRAPE_SERIES = {"up"}
Labels = dict[str, dict[str, set[str]]]


def dashboard_expressions() -> list[tuple[str, str]]:
    """(panel title, expression) of every query of the dashboard."""
    return [
        (panel["title"], target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    ]


def all_expressions() -> list[tuple[str, str]]:
    return dashboard_expressions() + [(rule["alert"], rule["expr"]) for rule in RULES]


async def scrape() -> str:
    engine = FakeEngine()
    state = make_state(engine)
    state.metrics.on_engine_ready(engine.info)
    transport = httpx.ASGITransport(app=create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        await client.post("/v1/completions", json={"prompt": "a"})
        return (await client.get("/metrics")).text


@pytest.fixture(scope="module")
def exported() -> Labels:
    """Label values by series and label, of a server that answered a request."""
    found: Labels = defaultdict(lambda: defaultdict(set))
    for family in text_string_to_metric_families(asyncio.run(scrape())):
        for sample in family.samples:
            labels = found[sample.name]
            for name, value in sample.labels.items():
                labels[name].add(value)
    return found


def test_every_expression_names_series_that_exist(exported: Labels) -> None:
    known = exported.keys() | SCRAPE_SERIES
    unknown = {title: series_names(text) - known for title, text in all_expressions()}
    assert {title: names for title, names in unknown.items() if names} == {}


def test_every_label_exists(exported: Labels) -> None:
    for title, text in all_expressions():
        for matcher in matchers(text):
            known = exported[matcher.name].keys() | SCRAPE_LABELS
            assert matcher.label in known, f"{title}: {matcher}"
        labels = {label for name in series_names(text) for label in exported[name]}
        assert grouping_labels(text) <= labels | SCRAPE_LABELS, title


def test_every_label_value_exists(exported: Labels) -> None:
    exact = [m for _, text in all_expressions() for m in matchers(text) if m.operator == "="]
    exact = [m for m in exact if m.label not in SCRAPE_LABELS]
    assert exact
    for matcher in exact:
        assert matcher.value in exported[matcher.name][matcher.label], matcher


def test_every_legend_uses_labels_of_its_expression() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = grouping_labels(target["expr"])
            # An aggregation keeps only what it groups by.
            if grouped or "sum(" in target["expr"]:
                assert labels <= grouped, target


def test_the_search_finds_names() -> None:
    text = (
        'histogram_quantile(0.99, sum by (le) (rate(a:b_bucket{x="y", z=~"$w"}[5m]))) > 1e3 '
        "and on (instance) up offset 5m / c_total"
    )
    assert series_names(text) == {"a:b_bucket", "up", "c_total"}
    assert [(m.name, m.label, m.value) for m in matchers(text)] == [
        ("a:b_bucket", "x", "y"),
        ("a:b_bucket", "z", "$w"),
    ]
    assert grouping_labels(text) == {"le", "instance"}


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("generate")


def test_the_dashboard_is_what_the_generator_writes(generate: ModuleType) -> None:
    assert generate.DASHBOARD.read_text(encoding="utf-8") == generate.render(), (
        "run `python docker/monitoring/generate.py`"
    )


def test_the_generator_refuses_a_metric_that_does_not_exist(generate: ModuleType) -> None:
    queries = generate.Queries(frozenset({"nsa_serve:ready"}))
    assert queries.total("ready").startswith("sum(nsa_serve:ready{")
    with pytest.raises(KeyError, match="no metric nsa_serve:tempo"):
        queries.total("tempo")


def test_every_metric_of_the_server_is_looked_at_or_left_out_on_purpose(
    generate: ModuleType,
) -> None:
    """A new metric is either shown or named here."""
    catalog = importlib.import_module("catalog")
    families = {
        f.name for f in catalog.make_registry().collect() if f.name.startswith("nsa_serve:")
    }
    shown = {name for _, text in all_expressions() for name in series_names(text)}
    hidden = {f for f in families if not any(name.startswith(f) for name in shown)}
    assert hidden == {
        f"nsa_serve:{name}"
        for name in (
            "cache_config_info",  # for gateways
            "num_requests_waiting_by_reason",  # one reason
            "prompt_tokens_by_source",  # shown as prompt_tokens_cached
            "request_inference_time_seconds",  # prefill and decode, both shown
            "request_max_num_generation_tokens",
            "request_num_preemptions",
            "request_params_max_tokens",
            "request_params_n",
            "request_prefill_kv_computed_tokens",
            "request_time_per_output_token_seconds",  # time between tokens is shown
        )
    }


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_say_what_and_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert {"summary", "description"} <= rule["annotations"].keys()
    assert "$labels" in rule["annotations"]["summary"] or "$value" in rule["annotations"]["summary"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
        ["check", "config", "--syntax-only", "prometheus.yml"],
    ],
    ids=lambda arguments: "-".join(arguments[:2]),
)
def test_promtool(arguments: list[str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run([promtool, *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_parses_the_dashboard(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    expressions = [text.replace("$__rate_interval", "1m") for _, text in dashboard_expressions()]
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(expressions)]
    file = tmp_path / "dashboard.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(expressions)} rules found" in done.stdout
