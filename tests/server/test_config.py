"""Flags, environment, YAML: one list of settings, one order of precedence, one-line errors."""

from pathlib import Path

import pytest
import yaml

from nsa_http.cli import main, make_parser
from nsa_http.config import all_fields, make_settings
from nsa_serve.config import EngineConfig
from nsa_serve.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in all_fields():
        monkeypatch.delenv(f"NSA_SERVE_{name.upper()}", raising=False)


def test_a_flag_beats_the_environment_beats_yaml_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("port: 1\nmax-num-seqs: 2\nmax_num_batched_tokens: 3\nserved-model-name: a\n")
    monkeypatch.setenv("NSA_SERVE_PORT", "10")
    monkeypatch.setenv("NSA_SERVE_MAX_NUM_SEQS", "20")
    settings = make_settings({"port": "100"}, str(file))
    assert settings.server.port == 100
    assert settings.engine.max_num_seqs == 20
    assert settings.engine.max_num_batched_tokens == 3
    assert settings.server.served_model_name == ["a"]
    assert settings.server.host == "127.0.0.1"
    assert settings.names_set == {
        "port",
        "max_num_seqs",
        "max_num_batched_tokens",
        "served_model_name",
    }


def test_keys_from_the_environment_are_split_and_never_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NSA_SERVE_API_KEY", "sesame, open")
    settings = make_settings({}, None)
    assert [key.get_secret_value() for key in settings.server.api_key] == ["sesame", "open"]
    assert "sesame" not in str(settings) + str(settings.as_dict()) + str(settings.non_default())


def test_a_kubernetes_service_link_is_no_port(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NSA_SERVE_PORT", "tcp://10.0.0.1:8000")
    assert make_settings({}, None).server.port == 8000
    assert "service link" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: [", "is not YAML"),
        ("- port", "must map flag names"),
        ("prot: 1", "unknown key: prot; did you mean port"),
        ("port: x", "port:"),
    ],
)
def test_a_wrong_yaml_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        make_settings({}, str(file))
    with pytest.raises(ConfigError, match="cannot read"):
        make_settings({}, str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["serve", "--max-num-seq", "3"],
            "unknown flag: --max-num-seq; did you mean --max-num-seqs",
        ),
        (["serve", "--prot=3"], "unknown flag: --prot; did you mean --port"),
        (["serve", "a", "b"], "unexpected argument: b"),
        (["serve", "a", "--model", "b"], "give the model once"),
        (["serve", "--port", "70000"], "port: "),
        (["serve", "--page-memory", "lots"], "page_memory: "),
        (["serve", "--dtype", "int3"], "dtype: "),
        (["serve", "--api-key"], "expected at least one argument"),
        (["health", "--url", "file:///etc/passwd"], "--url must start with http"),
        (["halth"], "invalid choice"),
        ([], "required"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("nsa-serve: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_switches_that_the_engine_may_decide_are_on_off_or_absent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for flags, expected in (
        ([], None),
        (["--async-scheduling"], True),
        (["--no-async-scheduling", "--max-model-len", "auto"], False),
    ):
        assert main(["serve", *flags, "--enforce-eager", "--print-config"]) == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["async_scheduling"] is expected
        assert printed["enforce_eager"] is True
        assert printed["max_model_len"] is None


def test_printed_config_can_be_read_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["serve", "some/model", "--page-memory", "1GiB", "--no-enable-prefix-caching"]
    assert main([*arguments, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert list(yaml.safe_load(printed)) == list(all_fields())
    file = tmp_path / "printed.yaml"
    file.write_text(printed)
    settings = make_settings({}, str(file))
    assert settings.engine == EngineConfig(
        model="some/model", page_memory=2**30, enable_prefix_caching=False
    )


def test_every_setting_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(["serve", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in all_fields().items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description
        assert " ".join(field.description.split()[:3]) in text


def test_flags_that_are_not_given_set_nothing() -> None:
    parsed = make_parser().parse_args(["serve", "--served-model-name", "a", "b"])
    assert vars(parsed) == {"command": "serve", "served_model_name": ["a", "b"]}
