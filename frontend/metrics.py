"""What `/metrics` shows: this process's own measures, and the scheduler's latest `Stats`.

Latencies are taken where an event reaches this process, before any client is slow to read it. All names start with
`ramet_`; times are in seconds. The registry is this object's own, not the library's global one.
"""

import time
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ramet.ipc.messages import STEP_BUCKETS_S, Stats

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0)
_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)

_COUNTERS = {
    "prompt_tokens": "Prompt tokens of the requests admitted",
    "cached_tokens": "Prompt tokens found in the prefix cache",
    "computed_tokens": "Tokens run through the model",
    "generated_tokens": "Tokens sampled",
    "finished": "Requests that ended by themselves",
    "aborted": "Requests told to stop",
    "failed": "Requests that failed",
    "preemptions": "Times a running request gave up its pages",
}


class EngineCollector(Collector):
    """Shows the scheduler's counters as they are; empty until it has sent some."""

    def __init__(self) -> None:
        self.stats: Stats | None = None

    def collect(self) -> Iterator[Metric]:
        if (stats := self.stats) is None:
            return
        requests = GaugeMetricFamily("ramet_scheduler_requests", "Requests in the scheduler", labels=["state"])
        requests.add_metric(["running"], stats.running)
        requests.add_metric(["waiting"], stats.waiting)
        yield requests
        pages = GaugeMetricFamily("ramet_kv_pages", "Pages of the KV cache", labels=["state"])
        pages.add_metric(["free"], stats.pages_free)
        pages.add_metric(["cached"], stats.pages_cached)
        pages.add_metric(["in_use"], stats.pages_total - stats.pages_free - stats.pages_cached)
        yield pages
        steps = HistogramMetricFamily("ramet_scheduler_step_seconds", "Time of a step: run and commit")
        counts = list(accumulate(stats.step_counts))
        bounds = [*(str(bound) for bound in STEP_BUCKETS_S), "+Inf"]
        steps.add_metric([], list(zip(bounds, counts, strict=True)), stats.step_seconds)
        yield steps
        for field, help_text in _COUNTERS.items():
            yield CounterMetricFamily(f"ramet_scheduler_{field}", help_text, value=getattr(stats, field))


class BatchMetrics:
    """Of the batches; ages are taken when the page is asked for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lines = Counter("ramet_batch_lines", "Lines of batches settled", ["outcome"], registry=registry)
        self.in_flight = Gauge("ramet_batch_lines_in_flight", "Lines of batches in the engine", registry=registry)
        self._batches = Gauge("ramet_batches", "Batches in the store", ["state"], registry=registry)
        self._oldest_at: int | None = None
        age = Gauge("ramet_batch_oldest_age_seconds", "Age of the oldest batch that has not ended", registry=registry)
        age.set_function(lambda: 0.0 if self._oldest_at is None else time.time() - self._oldest_at)

    def add_lines(self, completed: int, failed: int) -> None:
        self._lines.labels("completed").inc(completed)
        self._lines.labels("failed").inc(failed)

    def show(self, states: dict[str, int], oldest_at: int | None) -> None:
        """`oldest_at`: Unix time at which the oldest batch that has not ended was made."""
        self._oldest_at = oldest_at
        self._batches.clear()
        for state, count in states.items():
            self._batches.labels(state).set(count)


class Metrics:
    """The measures of one frontend process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineCollector()
        self.registry.register(self.engine)
        self.http_requests = Counter(
            "ramet_http_requests", "HTTP requests answered", ["route", "code"], registry=self.registry
        )
        self.http_in_flight = Gauge("ramet_http_requests_in_flight", "HTTP requests open", registry=self.registry)
        self.time_to_first_token = Histogram(
            "ramet_time_to_first_token_seconds",
            "From a request's admission to its first token",
            buckets=_FIRST_TOKEN_S,
            registry=self.registry,
        )
        self.inter_token_latency = Histogram(
            "ramet_inter_token_latency_seconds",
            "Time per token after the first",
            buckets=_TOKEN_S,
            registry=self.registry,
        )
        self.request_duration = Histogram(
            "ramet_request_duration_seconds",
            "From a request's admission to its end",
            buckets=_REQUEST_S,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "ramet_prompt_tokens", "Prompt tokens of requests that started; once for n choices", registry=self.registry
        )
        self.generation_tokens = Counter("ramet_generation_tokens", "Tokens generated", registry=self.registry)

        self.batches = BatchMetrics(self.registry)

    def page(self) -> bytes:
        return generate_latest(self.registry)
