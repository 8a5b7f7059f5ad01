"""Compose file and Kubernetes manifest: paths, ports, flags and times agree with the server."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nsa_http.cli import make_parser
from nsa_http.config import ServerConfig, all_fields
from nsa_http.middleware import PROBE_PATHS
from nsa_http.server import _CLOSE_GRACE_S, _ERROR_GRACE_S
from nsa_serve.config import ENV_PREFIX

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
MANIFESTS = {
    item["kind"]: item for item in yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())
}
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PROMETHEUS: dict[str, Any] = yaml.safe_load((DOCKER / "monitoring" / "prometheus.yml").read_text())
# What ends after the requests had their time: error events, open connections, the engine.
WIND_DOWN_S = _ERROR_GRACE_S + _CLOSE_GRACE_S


def setting(variable: str) -> str:
    assert variable.startswith(ENV_PREFIX)
    return variable.removeprefix(ENV_PREFIX).lower()


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)s", text)
    assert match is not None
    return float(match[1])


@pytest.mark.parametrize("name", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probes_ask_paths_that_need_no_key(name: str) -> None:
    probe = CONTAINER[name]["httpGet"]
    assert probe["path"] in PROBE_PATHS
    assert probe["port"] == CONTAINER["ports"][0]["name"]


def test_a_server_that_loads_or_drains_is_not_restarted() -> None:
    assert CONTAINER["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert CONTAINER["readinessProbe"]["httpGet"]["path"] == "/ready"
    startup = CONTAINER["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600


def test_kubernetes_waits_longer_than_the_server_drains() -> None:
    flags = vars(make_parser().parse_args(CONTAINER["args"]))
    command, wait_s = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    needed_s = float(wait_s) + float(flags["shutdown_timeout"]) + WIND_DOWN_S
    assert POD["terminationGracePeriodSeconds"] > needed_s


def test_flags_and_variables_are_settings() -> None:
    names = {setting(item["name"]) for item in CONTAINER["env"]}
    service = COMPOSE["services"]["nsa-serve"]
    names |= {setting(name) for name in service["environment"]}
    assert names <= all_fields().keys()
    assert make_parser().parse_args(CONTAINER["args"]).command == "serve"


def test_ports_agree() -> None:
    port = ServerConfig().port
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": port}]
    assert MANIFESTS["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    assert MANIFESTS["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"] == "http"
    assert COMPOSE["services"]["nsa-serve"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    (scrape,) = PROMETHEUS["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == [f"nsa-serve:{port}"]


def test_selectors_find_the_pods() -> None:
    labels = MANIFESTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert MANIFESTS[kind]["spec"]["selector"]["matchLabels"] == labels
    assert MANIFESTS["Service"]["spec"]["selector"] == labels
    # Alerts and dashboard know the server by this job name.
    job = labels[MANIFESTS["PodMonitor"]["spec"]["jobLabel"]]
    assert job == PROMETHEUS["scrape_configs"][0]["job_name"] == "nsa-serve"


def test_the_pod_has_no_rights_that_it_does_not_need() -> None:
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["runAsGroup"] == 0
    assert POD["automountServiceAccountToken"] is False
    context = CONTAINER["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert {mount["mountPath"] for mount in CONTAINER["volumeMounts"]} == {"/cache", "/tmp"}


def test_a_service_cannot_set_our_variables() -> None:
    """A service called nsa-serve would set NSA_SERVE_PORT."""
    assert MANIFESTS["Service"]["metadata"]["name"] == "nsa-serve"
    assert POD["enableServiceLinks"] is False


def test_compose_publishes_on_this_machine_only_and_drops_rights() -> None:
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["cap_drop"] == ["ALL"], name
    assert COMPOSE["services"]["nsa-serve"]["read_only"] is True


def test_compose_waits_longer_than_the_server_drains() -> None:
    service = COMPOSE["services"]["nsa-serve"]
    timeout_s = float(service["environment"]["NSA_SERVE_SHUTDOWN_TIMEOUT"])
    assert seconds(service["stop_grace_period"]) > timeout_s + WIND_DOWN_S


def test_prometheus_has_the_key() -> None:
    (secret,) = COMPOSE["services"]["prometheus"]["secrets"]
    variable = COMPOSE["secrets"][secret]["environment"]
    assert variable in COMPOSE["services"]["nsa-serve"]["environment"]
    file = PROMETHEUS["scrape_configs"][0]["authorization"]["credentials_file"]
    assert file == f"/run/secrets/{secret}"


def test_mounted_files_exist() -> None:
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DOCKER / source).exists(), volume
    dockerfile = COMPOSE["services"]["nsa-serve"]["build"]["dockerfile"]
    assert (DOCKER.parent / dockerfile).is_file()


def test_compose_follows_the_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [*command, DOCKER / "compose.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["Deployment", "Service", "PodDisruptionBudget"])
def test_kubernetes_follows_the_schema(kind: str) -> None:
    reason = "kubernetes-validate is not installed (its schemas are 108 MB)"
    validator = pytest.importorskip("kubernetes_validate", reason=reason)
    validator.validate(MANIFESTS[kind], "1.37", strict=True)
