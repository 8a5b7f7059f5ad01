"""How metrics are named, labelled and bucketed; and vLLM's names for those that vLLM has too."""

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

PREFIX: Final = "nsa_serve:"
VLLM_PREFIX: Final = "vllm:"
LABELS: Final = ("model_name", "engine")

TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
# vLLM starts at 10 ms, which is too coarse for small models: four bounds below it are ours.
TOKEN_LATENCY_BUCKETS_S = (
    *(0.001, 0.002, 0.004, 0.006),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_LATENCY_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
TOKEN_COUNT_BUCKETS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP_BLOCK_BUCKETS = tuple(4**power for power in range(10))
SAMPLE_COUNT_BUCKETS = (1, 2, 5, 10, 20)
PREEMPTION_COUNT_BUCKETS = (1, 2, 3, 4, 5, 10, 20)


class Families:
    """Creates the metrics of one model on a registry.

    has_vllm_names: also export under `vllm:` what is created with `is_vllm`; the same objects are
    rendered a second time, so nothing is counted twice and the two can never differ.
    """

    def __init__(
        self, registry: CollectorRegistry, model_name: str, *, has_vllm_names: bool
    ) -> None:
        self.registry = registry
        self.label_values = (model_name, "0")
        self._twins = _Twins()
        if has_vllm_names:
            registry.register(self._twins)

    def gauge(self, name: str, text: str, *, is_vllm: bool = False) -> Gauge:
        """Return a gauge that has only the common labels."""
        return self.gauge_family(name, text, is_vllm=is_vllm).labels(*self.label_values)

    def gauge_family(self, name: str, text: str, *labels: str, is_vllm: bool = False) -> Gauge:
        """Return a gauge with labels after the common ones, which `label_values` fills."""
        family = Gauge(PREFIX + name, text, (*LABELS, *labels), registry=self.registry)
        self._note(family, is_vllm)
        return family

    def counter(self, name: str, text: str, *, is_vllm: bool = False) -> Counter:
        """Return a counter that has only the common labels."""
        return self.counter_family(name, text, is_vllm=is_vllm).labels(*self.label_values)

    def counter_family(self, name: str, text: str, *labels: str, is_vllm: bool = False) -> Counter:
        """Return a counter with labels after the common ones, which `label_values` fills."""
        family = Counter(PREFIX + name, text, (*LABELS, *labels), registry=self.registry)
        self._note(family, is_vllm)
        return family

    def histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *, is_vllm: bool = True
    ) -> Histogram:
        """Return a histogram that has only the common labels."""
        family = Histogram(PREFIX + name, text, LABELS, registry=self.registry, buckets=buckets)
        self._note(family, is_vllm)
        return family.labels(*self.label_values)

    def _note(self, family: MetricWrapperBase, is_vllm: bool) -> None:
        if is_vllm:
            self._twins.families.append(family)


class _Twins(Collector):
    """Yields metrics under vLLM's prefix."""

    def __init__(self) -> None:
        self.families: list[MetricWrapperBase] = []

    def collect(self) -> Iterator[Metric]:
        for family in self.families:
            for metric in family.collect():
                twin = Metric(_vllm_name(metric.name), metric.documentation, metric.type)
                twin.samples = [
                    sample._replace(name=_vllm_name(sample.name)) for sample in metric.samples
                ]
                yield twin


def _vllm_name(name: str) -> str:
    return VLLM_PREFIX + name.removeprefix(PREFIX)
