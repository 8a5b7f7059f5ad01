"""Settings that belong together, TLS, and the table of settings in the documentation."""

import json
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from nsa_http.cli import main
from nsa_http.config import ServerConfig, all_fields, make_settings
from nsa_http.tls import server_context
from nsa_serve.config import make_config
from nsa_serve.errors import ConfigError
from tests.e2e.process import ROOT, Process


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in all_fields():
        monkeypatch.delenv(f"NSA_SERVE_{name.upper()}", raising=False)


def documented_settings() -> dict[str, str]:
    """Flag names of the table in the documentation, each with its default as written there."""
    text = (ROOT / "docs" / "serving.md").read_text()
    section = text.partition("\n## Settings\n")[2].partition("\n## ")[0]
    found: dict[str, str] = {}
    for line in section.splitlines():
        if not line.startswith("| `--"):
            continue
        flags, default, _meaning = (cell.strip() for cell in line.strip("|").split("|"))
        names = re.findall(r"`--(?:\[no-\])?([a-z0-9-]+)`", flags)
        defaults = default.split(", ") if default and len(names) > 1 else [default] * len(names)
        for name, shown in zip(names, defaults, strict=True):
            found[name.replace("-", "_")] = shown.strip("`")
    return found


def test_the_table_of_settings_names_each_one() -> None:
    assert set(documented_settings()) == set(all_fields())


def test_the_table_of_settings_has_the_defaults() -> None:
    documented = documented_settings()
    units = {"MiB": 2**20, "KiB": 2**10}
    for name, field in all_fields().items():
        shown, default = documented[name], field.default
        if isinstance(default, bool):
            assert shown == ("on" if default else "off"), name
        elif isinstance(default, int | float):
            number, _, unit = shown.partition(" ")
            assert float(number) * units.get(unit, 1) == default, name
        elif isinstance(default, str) and default:
            assert shown == default, name
        elif isinstance(default, list) and default:
            assert shown == " ".join(default), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ssl_keyfile": "k.pem"}, "need ssl_certfile"),
        ({"ssl_ca_certs": "ca.pem"}, "need ssl_certfile"),
        ({"allow_credentials": True}, "need allowed_origins"),
        ({"allowed_methods": ["GET"]}, "need allowed_origins"),
        ({"allowed_origins": ["*"], "allow_credentials": True}, "by name, not"),
        ({"allowed_origins": ['["a"']}, "one JSON list"),
        ({"root_path": "llm"}, "starts with /"),
        ({"root_path": "/llm/"}, "does not end"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        make_config(ServerConfig, {"api_key": ["sesame"], **values})
    assert "sesame" not in str(caught.value)


def test_a_wrong_key_is_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"api_key\.1: .*, got a secret") as caught:
        make_config(ServerConfig, {"api_key": ["sesame", 20111]})
    assert "sesame" not in str(caught.value)
    assert "20111" not in str(caught.value)


@pytest.mark.parametrize("text", ["https://a.b,https://c.d", '["https://a.b","https://c.d"]'])
def test_origins_are_a_list_or_vllms_json(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("NSA_SERVE_ALLOWED_ORIGINS", text)
    assert make_settings({}, None).server.allowed_origins == ["https://a.b", "https://c.d"]
    flags = {"allowed_origins": ['["*"]']}
    assert make_settings(flags, None).server.allowed_origins == ["*"]


class Certificates:
    """PEM files of a server and of its authority."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.chain, self.ca = folder / "chain.pem", folder / "ca.pem"
        self.authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(
            str(self.chain)
        )
        self.authority.cert_pem.write_to_path(str(self.ca))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def spawn() -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def spawn(*flags: str) -> Process:
        processes.append(Process("-m", "tests.server.live", "--port", "0", *flags))
        return processes[-1]

    yield spawn
    for process in processes:
        process.kill()


def test_https_is_served_and_health_trusts_its_own_certificate(
    spawn: Callable[..., Process],
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = spawn("--ssl-certfile", str(certificates.chain)).wait_ready().url
    assert url.startswith("https://")
    trusting = ssl.create_default_context(cafile=str(certificates.ca))
    port = url.rpartition(":")[2]
    with urllib.request.urlopen(f"https://localhost:{port}/v1/models", context=trusting) as answer:
        assert json.load(answer)["object"] == "list"
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"https://localhost:{port}/health", timeout=10)
    monkeypatch.setenv("NSA_SERVE_PORT", port)
    monkeypatch.setenv("NSA_SERVE_SSL_CERTFILE", str(certificates.chain))
    assert main(["health"]) == 0
    assert capsys.readouterr().out == "healthy\n"


def test_with_authorities_a_client_needs_a_certificate(
    spawn: Callable[..., Process], certificates: Certificates
) -> None:
    chain, ca = str(certificates.chain), str(certificates.ca)
    port = spawn("--ssl-certfile", chain, "--ssl-ca-certs", ca).wait_ready().url.rpartition(":")[2]
    context = ssl.create_default_context(cafile=ca)
    with pytest.raises(OSError, match=r"certificate.required|closed|reset|CERTIFICATE"):
        urllib.request.urlopen(f"https://localhost:{port}/health", context=context, timeout=10)
    context.load_cert_chain(chain)
    with urllib.request.urlopen(f"https://localhost:{port}/health", context=context) as answer:
        assert answer.status == 200


def test_unusable_certificates_are_named(certificates: Certificates, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for certfile, ca in ((tmp_path / "absent.pem", None), (empty, None), (certificates.ca, None)):
        with pytest.raises(ConfigError, match=r"--ssl-certfile .*give PEM files"):
            server_context(ServerConfig(ssl_certfile=str(certfile), ssl_ca_certs=ca))
    with pytest.raises(ConfigError, match=r"--ssl-ca-certs .*give a PEM"):
        server_context(ServerConfig(ssl_certfile=str(certificates.chain), ssl_ca_certs=str(empty)))


def test_a_proxy_may_serve_under_a_root_path(spawn: Callable[..., Process]) -> None:
    url = spawn("--root-path", "/llm").wait_ready().url
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=10) as answer:
        assert json.load(answer)["servers"] == [{"url": "/llm"}]
