"""The metrics that the server has, and PromQL expressions over them.

Every name that an expression uses is looked up in the registry of a real app, so a dashboard cannot
name what does not exist.
"""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from nsa_http.app import create_app
from nsa_http.config import ServerConfig
from nsa_http.state import ServerState
from nsa_serve.messages import CacheComponent, EngineInfo
from nsa_serve.metrics import Metrics

PREFIX = "nsa_serve:"
MODEL = "model"
_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_count", "_sum"),
}


def make_registry() -> CollectorRegistry:
    """Return the registry of a server that has loaded a model."""
    metrics = Metrics(MODEL)
    metrics.on_engine_ready(
        EngineInfo(
            family="native",
            dtype="bfloat16",
            device="cpu",
            num_parameters=1,
            weight_bytes=2,
            max_model_len=64,
            max_num_seqs=32,
            vocab_size=256,
            page_size=64,
            num_pages=1,
            cache=[CacheComponent("raw", 1.0, 64)],
            phase_s={"weights": 1.0},
        )
    )
    # The app registers the counters of HTTP requests.
    create_app(ServerState(ServerConfig(), metrics, [MODEL]))
    return metrics.registry


def series_names(registry: CollectorRegistry) -> frozenset[str]:
    """Return the names that queries may use, of series that may come only with a request too."""
    return frozenset(
        family.name + suffix
        for family in registry.collect()
        for suffix in _SUFFIXES.get(family.type, ("",))
    )


class Queries:
    """Builds expressions for one dashboard, restricted to its chosen models and instances."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def series(self, name: str, *matchers: str) -> str:
        """Return a selector of our metric `name`; other exporters' names are given in full."""
        full = name if name in self._names else PREFIX + name
        if full not in self._names:
            raise KeyError(f"the server has no metric {full}")
        chosen = ['model_name=~"$model"'] if full.startswith(PREFIX) else []
        matched = ", ".join([*chosen, 'instance=~"$instance"', *matchers])
        return f"{full}{{{matched}}}"

    def total(self, name: str, *by: str) -> str:
        """Return the sum of a gauge over instances."""
        return f"sum{_by(by)}({self.series(name)})"

    def rate(self, name: str, *by: str, matchers: tuple[str, ...] = ()) -> str:
        """Return a counter's growth per second."""
        return f"sum{_by(by)}(rate({self.series(name, *matchers)}[$__rate_interval]))"

    def ratio(self, part: str, whole: str, *by: str) -> str:
        """Return the quotient of two counters' growth."""
        return f"{self.rate(part, *by)} / {self.rate(whole, *by)}"

    def quantile(self, q: float, histogram: str) -> str:
        """Return a quantile of a histogram over the range."""
        buckets = self.rate(f"{histogram}_bucket", "le")
        return f"histogram_quantile({q:g}, {buckets})"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""
