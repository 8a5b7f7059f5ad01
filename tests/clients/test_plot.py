"""The latency plot and the progress bar."""

import asyncio
import io
import math
from pathlib import Path

import pytest

from nsa_client.bench_stats import BenchResult, RequestRecord
from nsa_client.cli import main
from nsa_client.plot import requests_in_flight, write_plot
from nsa_client.progress import ProgressBar, progress_line
from tests.clients.raw_server import RawServer
from tests.clients.test_bench import answer
from tests.clients.test_cli import Terminal

RECORDS = (
    RequestRecord(10.0, 1.0, 0.2, (0.1, 0.3), num_prompt_tokens=4, num_output_tokens=5),
    RequestRecord(10.5, 2.0, 0.4, num_prompt_tokens=6, num_output_tokens=1),
    RequestRecord(10.25, 0.25, error="no"),
)


def result(*records: RequestRecord) -> BenchResult:
    return BenchResult(records=records, duration_s=2.5, client_cpu_s=0.1)


def test_requests_in_flight_are_counted_at_every_change() -> None:
    times_s, counts = requests_in_flight(result(*RECORDS))
    assert times_s == [0.0, 0.25, 0.5, 0.5, 1.0, 2.5]
    # One request ends as another begins: the end comes first.
    assert counts == [1, 2, 1, 2, 1, 0]


@pytest.mark.parametrize("records", [RECORDS, RECORDS[1:2]])
def test_a_plot_is_a_png(records: tuple[RequestRecord, ...], tmp_path: Path) -> None:
    path = tmp_path / "latency.png"
    write_plot(result(*records), path, title="tiny")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1320, 840)
    # The picture shows the data: other latencies, other bytes.
    write_plot(result(RequestRecord(0.0, 1.0, 0.9, (0.5,))), path, title="tiny")
    assert path.read_bytes() != data


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no request succeeded"):
        write_plot(result(RECORDS[2]), tmp_path / "x.png", title="tiny")


async def test_bench_draws_shows_progress_and_leaves_the_terminal_clean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    plot, json_file = tmp_path / "x.png", tmp_path / "x.json"
    async with RawServer(answer) as server:
        load = ["--num-prompts", "3", "--vocab-size", "9", "--output-len", "2", "--model", "tiny"]
        out = ["--plot", str(plot), "--result-file", str(json_file), "--save-detailed"]
        arguments = ["bench", "--url", server.url, *load, *out]
        assert await asyncio.to_thread(lambda: main(arguments)) == 0
        shown = terminal.getvalue()
        assert "3/3" in shown
        assert shown.endswith("\r") and shown.rsplit("\r", 2)[1].isspace()
        assert await asyncio.to_thread(lambda: main([*arguments, "--no-progress"])) == 0
    assert terminal.getvalue() == shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = json_file.read_text(encoding="utf-8")
    assert '"output_lens": [' in text
    assert '"model_id": "tiny"' in text
    assert capsys.readouterr().out.count("Completed requests") == 2


def test_a_pipe_gets_no_progress_bar() -> None:
    out = io.StringIO()
    bar = ProgressBar(1, out)
    bar.update(RECORDS[0])
    bar.close()
    assert out.getvalue() == ""


def test_progress_line() -> None:
    def line(num_ended: int, num_failed: int = 0, elapsed_s: float = 5.0) -> str:
        return progress_line(
            num_ended, 300, num_failed=num_failed, num_output_tokens=40, elapsed_s=elapsed_s
        )

    assert line(10) == "░" * 24 + " 10/300  2.00 requests/s  8 tokens/s  2:25 left"
    assert line(150, 3).startswith("█" * 12 + "░" * 12 + " 150/300, 3 failed  30.00 requests/s")
    assert line(300).startswith("█" * 24 + " 300/300 ")
    assert math.isfinite(float(line(1, elapsed_s=0.0).split()[2]))
