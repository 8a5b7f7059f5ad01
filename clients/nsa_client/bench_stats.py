"""What a benchmark measured: one record a request, the statistics, the table, the JSON."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (without the first)",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request. Times in seconds from the moment it was sent; error: why it failed.

    ttft_s: to the first piece of text. itls_s: the gaps between pieces of text, one fewer than the
    pieces; a piece may hold several tokens. Token counts are those that the server reports.
    """

    start_s: float
    e2el_s: float
    ttft_s: float = math.nan
    itls_s: tuple[float, ...] = ()
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None for an answer of one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.num_output_tokens - 1)

    def is_good(self, goodput: Mapping[str, float]) -> bool:
        """Tell whether it succeeded within all the limits, in milliseconds."""
        if self.error is not None:
            return False
        values_s = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2el": self.e2el_s}
        # An answer of one token has no TPOT that could be too long.
        return all((values_s[metric] or 0.0) * 1e3 <= limit for metric, limit in goodput.items())


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """Statistics of a latency in milliseconds; all None when there is no sample."""

    mean_ms: float | None
    median_ms: float | None
    std_ms: float | None
    p99_ms: float | None

    @classmethod
    def from_seconds(cls, samples_s: Sequence[float]) -> "LatencyStats":
        """Summarise samples in seconds. std is that of the population, as numpy's is."""
        if not samples_s:
            return cls(None, None, None, None)
        return cls(
            mean_ms=statistics.fmean(samples_s) * 1e3,
            median_ms=percentile(samples_s, 50) * 1e3,
            std_ms=statistics.pstdev(samples_s) * 1e3,
            p99_ms=percentile(samples_s, 99) * 1e3,
        )


def percentile(samples: Sequence[float], q: float) -> float:
    """Return the q-th percentile (0 to 100), linear between the nearest samples."""
    ordered = sorted(samples)
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """A finished run.

    duration_s: from the first request sent to the last answer. client_cpu_s: CPU time that the load
    generator itself took in it. Latencies are over the requests that succeeded. goodput: the limits
    of a good request, see `BenchConfig`.
    """

    records: tuple[RequestRecord, ...]
    duration_s: float
    client_cpu_s: float
    model: str = ""
    goodput: Mapping[str, float] = field(default_factory=dict)

    @property
    def completed(self) -> tuple[RequestRecord, ...]:
        """The requests that succeeded."""
        return tuple(record for record in self.records if record.error is None)

    @property
    def num_failed(self) -> int:
        """How many requests failed."""
        return len(self.records) - len(self.completed)

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of the requests that succeeded."""
        return sum(record.num_prompt_tokens for record in self.completed)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of the requests that succeeded."""
        return sum(record.num_output_tokens for record in self.completed)

    @property
    def request_goodput(self) -> float | None:
        """Good requests per second; None without limits."""
        if not self.goodput:
            return None
        return sum(record.is_good(self.goodput) for record in self.records) / self.duration_s

    def samples_s(self, metric: str) -> list[float]:
        """Return the samples of "ttft", "tpot", "itl" or "e2el" in seconds."""
        done = self.completed
        samples = {
            "ttft": lambda: [record.ttft_s for record in done],
            "tpot": lambda: [record.tpot_s for record in done if record.tpot_s is not None],
            "itl": lambda: [itl_s for record in done for itl_s in record.itls_s],
            "e2el": lambda: [record.e2el_s for record in done],
        }
        return samples[metric]()

    def latency(self, metric: str) -> LatencyStats:
        """Return the statistics of "ttft", "tpot", "itl" or "e2el"."""
        return LatencyStats.from_seconds(self.samples_s(metric))

    def details(self) -> dict[str, Any]:
        """Return each request's numbers, in order, under vLLM's names; a failed one has zeros."""
        done = [record.error is None for record in self.records]
        rows = list(zip(self.records, done, strict=True))
        return {
            "input_lens": [record.num_prompt_tokens for record in self.records],
            "output_lens": [record.num_output_tokens for record in self.records],
            "ttfts": [record.ttft_s if is_done else 0.0 for record, is_done in rows],
            "itls": [list(record.itls_s) for record in self.records],
            "errors": [record.error or "" for record in self.records],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the result under the field names of `vllm bench serve`."""
        completed = len(self.completed)
        num_tokens = self.num_prompt_tokens + self.num_output_tokens
        result: dict[str, Any] = {
            "model_id": self.model,
            "duration": self.duration_s,
            "completed": completed,
            "failed": self.num_failed,
            "total_input_tokens": self.num_prompt_tokens,
            "total_output_tokens": self.num_output_tokens,
            "request_throughput": completed / self.duration_s,
            "request_goodput": self.request_goodput,
            "output_throughput": self.num_output_tokens / self.duration_s,
            "total_token_throughput": num_tokens / self.duration_s,
        }
        for metric in METRICS:
            stats = self.latency(metric)
            for name in ("mean", "median", "std", "p99"):
                result[f"{name}_{metric}_ms"] = getattr(stats, f"{name}_ms")
        result["client_cpu_seconds"] = self.client_cpu_s
        errors = Counter(record.error for record in self.records if record.error is not None)
        return result | {"error_counts": dict(errors)}

    def table(self) -> str:
        """Return the result for a terminal."""
        values = self.to_dict()
        rows = [
            ("Completed requests", f"{values['completed']}"),
            ("Failed requests", f"{values['failed']}"),
            ("Duration (s)", f"{values['duration']:.2f}"),
            ("Prompt tokens", f"{values['total_input_tokens']}"),
            ("Output tokens", f"{values['total_output_tokens']}"),
            ("Requests/s", f"{values['request_throughput']:.2f}"),
            *self._goodput_rows(),
            ("Output tokens/s", f"{values['output_throughput']:.2f}"),
            ("Total tokens/s", f"{values['total_token_throughput']:.2f}"),
            ("Client CPU (s)", f"{values['client_cpu_seconds']:.2f}"),
        ]
        lines = [f"{name:<44}{value:>12}" for name, value in rows]
        lines.append(f"{'Latency (ms)':<44}{'mean':>12}{'median':>12}{'p99':>12}")
        for metric, title in METRICS.items():
            cells = (values[f"{name}_{metric}_ms"] for name in ("mean", "median", "p99"))
            row = "".join(f"{'-' if cell is None else f'{cell:.2f}':>12}" for cell in cells)
            lines.append(f"{title:<44}{row}")
        lines += [
            f"failed {count} times: {error}" for error, count in values["error_counts"].items()
        ]
        return "\n".join(lines)

    def _goodput_rows(self) -> list[tuple[str, str]]:
        if self.request_goodput is None:
            return []
        limits = ", ".join(f"{metric} {limit:g} ms" for metric, limit in self.goodput.items())
        return [(f"Good requests/s ({limits})", f"{self.request_goodput:.2f}")]
