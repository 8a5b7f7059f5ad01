"""Write the Grafana dashboard from the server's metrics.

python docker/monitoring/generate.py            # writes grafana/dashboards/nsa-serve.json
python docker/monitoring/generate.py --check    # exits with 1 when that file is out of date
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from catalog import PREFIX, Queries, make_registry, series_names
from panels import Panel, rows

DASHBOARD = Path(__file__).parent / "grafana" / "dashboards" / "nsa-serve.json"
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH = 24
_HEIGHTS = {"stat": 4, "bargauge": 8, "timeseries": 8}


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the file; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the Grafana dashboard.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when outdated")
    text = render()
    if parser.parse_args(argv).check:
        return 0 if DASHBOARD.is_file() and DASHBOARD.read_text() == text else 1
    DASHBOARD.write_text(text)
    return 0


def render() -> str:
    """Return the dashboard as JSON."""
    return json.dumps(dashboard(Queries(series_names(make_registry()))), indent=2) + "\n"


def dashboard(new: Queries) -> dict[str, Any]:
    """Return the dashboard in Grafana's schema."""
    return {
        "uid": "nsa-serve",
        "title": "nsa-serve",
        "tags": ["nsa-serve"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables()},
        "panels": layout(rows(new)),
    }


def variables() -> list[dict[str, Any]]:
    """Return the choices at the top: data source, model, instance."""
    ready = f"{PREFIX}ready"

    def choice(name: str, query: str) -> dict[str, Any]:
        return {
            "name": name,
            "type": "query",
            "datasource": _DATASOURCE,
            "query": {"query": query, "refId": name},
            "definition": query,
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        }

    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        choice("model", f"label_values({ready}, model_name)"),
        choice("instance", f'label_values({ready}{{model_name=~"$model"}}, instance)'),
    ]


def layout(content: list[tuple[str, list[Panel]]]) -> list[dict[str, Any]]:
    """Place the panels from left to right, and each row below the one before."""
    placed: list[dict[str, Any]] = []
    y = 0
    for title, panels in content:
        placed.append(
            {
                "id": len(placed) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1},
                "panels": [],
            }
        )
        y += 1
        x = 0
        for panel in panels:
            height = _HEIGHTS[panel.kind]
            if x + panel.width > _WIDTH:
                x, y = 0, y + height
            position = {"x": x, "y": y, "w": panel.width, "h": height}
            placed.append(render_panel(panel, len(placed) + 1, position))
            x += panel.width
        y += _HEIGHTS[panels[-1].kind]
    return placed


def render_panel(panel: Panel, number: int, position: dict[str, int]) -> dict[str, Any]:
    """Return one panel in Grafana's schema."""
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.max_value is not None:
        defaults["max"] = panel.max_value
    is_single = panel.kind != "timeseries"
    options = {"reduceOptions": {"calcs": ["lastNotNull"]}} if is_single else {}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
                "range": True,
            }
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
