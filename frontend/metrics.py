"""What `/metrics` shows: this process's own measures, the scheduler's `Stats`, and each process's resources.

Latencies are taken where an event reaches this process, before any client is slow to read it. Requests are counted
here, where each ends exactly once; so is what the scheduler tells, that no restart of it sets a count back. All names
start with `ramet_`, but for `process_*`; `docs/metrics.md` lists them. The registry is this object's own, not the
library's global one.
"""

import collections
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import ramet
from ramet.frontend.config import BUCKETS
from ramet.ipc.messages import Stats

logger = logging.getLogger(__name__)

THROUGHPUT_INTERVAL_S = 10.0

# Fields of `Counters`: name, help.
_COUNTERS = {
    "prompt_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache, for each choice"),
    "cached_tokens": ("prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "computed_tokens": ("scheduler_computed_tokens", "Tokens run through the model"),
    "generated_tokens": ("scheduler_generated_tokens", "Tokens sampled"),
    "finished": ("scheduler_finished", "Requests that ended by themselves in the scheduler"),
    "aborted": ("scheduler_aborted", "Requests that the scheduler was told to stop, also by a stop string"),
    "failed": ("scheduler_failed", "Requests that failed in the scheduler"),
    "preemptions": ("scheduler_preemptions", "Times a running request gave up its pages"),
}

_OF_PROCESSES: tuple[tuple[Any, str, str, Callable[[psutil.Process], float]], ...] = (
    (CounterMetricFamily, "process_cpu_seconds", "CPU time, user and system", lambda it: sum(it.cpu_times()[:2])),
    (GaugeMetricFamily, "process_resident_memory_bytes", "Resident memory", lambda it: it.memory_info().rss),
    (GaugeMetricFamily, "process_open_fds", "Open file descriptors", psutil.Process.num_fds),
    (GaugeMetricFamily, "process_threads", "Threads", psutil.Process.num_threads),
)


class ProcessCollector(Collector):
    """CPU time, memory, descriptors and threads of the engine's processes, read when the page is asked for."""

    def __init__(self) -> None:
        self._processes: dict[str, psutil.Process] = {}

    def watch(self, pids: Mapping[str, int]) -> None:
        """From now on these, by name."""
        self._processes = {}
        for name, pid in pids.items():
            try:
                self._processes[name] = psutil.Process(pid)
            except psutil.NoSuchProcess:
                logger.warning("%s is gone already", name)

    def collect(self) -> Iterator[Metric]:
        families = [kind(name, words, labels=["process"]) for kind, name, words, _ in _OF_PROCESSES]
        for name, process in self._processes.items():
            try:
                with process.oneshot():
                    values = [read(process) for _, _, _, read in _OF_PROCESSES]
                    if not process.is_running():  # another one has its pid now
                        continue
            except psutil.Error:
                continue  # it is gone, and so are its numbers
            for family, value in zip(families, values, strict=True):
                family.add_metric([name], value)
        yield from families


class EngineMetrics:
    """What the scheduler tells. Logs how it goes, every ten seconds while there is work."""

    def __init__(self, registry: CollectorRegistry, buckets: Mapping[str, tuple[float, ...]]) -> None:
        self.stats: Stats | None  # the latest
        self._counters = {
            field: Counter(f"ramet_{name}", words, registry=registry) for field, (name, words) in _COUNTERS.items()
        }
        self._requests = Gauge("ramet_scheduler_requests", "Requests in the scheduler", ["state"], registry=registry)
        self._pages = Gauge("ramet_kv_pages", "Pages of the KV cache", ["state"], registry=registry)
        self._usage = Gauge(
            "ramet_kv_usage_ratio", "Share of the KV cache's pages that requests hold", registry=registry
        )
        phases = _histogram(buckets, registry, "scheduler_step_seconds", "Time of a step by phase", "phase")
        self._phases = [phases.labels(phase) for phase in ("schedule", "run", "commit")]
        self._rows = _histogram(buckets, registry, "scheduler_step_rows", "Requests computed in a step")
        self.forget()
        self._interval: collections.Counter[str] = collections.Counter()
        self._since = self._heard_at = 0.0

    def update(self, stats: Stats) -> None:
        self.stats = stats
        for field, counter in self._counters.items():
            counter.inc(getattr(stats.news, field))
        in_use = stats.pages_total - stats.pages_free - stats.pages_cached
        self._requests.labels("running").set(stats.running)
        self._requests.labels("waiting").set(stats.waiting)
        for state, number in (("free", stats.pages_free), ("cached", stats.pages_cached), ("in_use", in_use)):
            self._pages.labels(state).set(number)
        self._usage.set(usage := in_use / max(1, stats.pages_total))
        for step in stats.steps:
            for phase, seconds in zip(self._phases, (step.schedule_s, step.run_s, step.commit_s), strict=True):
                phase.observe(seconds)
            self._rows.observe(step.rows)
        self._log_throughput(stats, usage, time.monotonic())

    def forget(self) -> None:
        """A scheduler that has died, or has told nothing yet, has no requests, and nobody knows its pages."""
        self.stats = None
        self._requests.labels("running").set(0)
        self._requests.labels("waiting").set(0)
        self._usage.set(0)
        self._pages.clear()

    def _log_throughput(self, stats: Stats, usage: float, now: float) -> None:
        """Needs no timer, since the scheduler tells something every second while it has work, and else nothing."""
        silence_s, self._heard_at = now - self._heard_at, now
        total = self._interval
        if silence_s > THROUGHPUT_INTERVAL_S:
            self._since = now
            total.clear()
        total.update({name: getattr(stats.news, name) for name in _COUNTERS})
        if (took_s := now - self._since) >= THROUGHPUT_INTERVAL_S:
            fields = {
                "running": stats.running,
                "waiting": stats.waiting,
                "prompt_tokens_per_s": round(total["prompt_tokens"] / took_s, 1),
                "generated_tokens_per_s": round(total["generated_tokens"] / took_s, 1),
                "kv_usage": round(usage, 3),
                "prefix_hit_rate": round(total["cached_tokens"] / max(1, total["prompt_tokens"]), 3),
            }
            logger.info("throughput", extra={"fields": fields})
            self._since = now
            total.clear()


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
    """The measures of one frontend process. `buckets` stand in place of those of `BUCKETS`."""

    def __init__(self, buckets: Mapping[str, tuple[float, ...]] | None = None, model: str = "") -> None:
        self.registry = registry = CollectorRegistry()
        buckets = {**BUCKETS, **(buckets or {})}
        counter = functools.partial(Counter, namespace="ramet", registry=registry)
        Info("ramet_build", "Version and model", registry=registry).info({"version": ramet.__version__, "model": model})
        self.processes = ProcessCollector()
        registry.register(self.processes)
        self.engine = EngineMetrics(registry, buckets)
        self.engine_restarts = counter("engine_restarts", "Times the engine came back after a process of it had died")
        self.requests_resumed = counter("requests_resumed", "Choices and questions sent again after a process had died")
        self.http_requests = counter("http_requests", "HTTP requests answered", ["route", "code"])
        self.http_in_flight = Gauge("ramet_http_requests_in_flight", "HTTP requests open", registry=registry)
        self.requests_finished = counter(
            "requests_finished", "Choices and embeddings that ended, by reason", ["reason"]
        )
        for reason in ("stop", "length", "abort", "error"):
            self.requests_finished.labels(reason)  # a rate needs the 0 before the first
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that started; once for n choices")
        self.generation_tokens = counter("generation_tokens", "Tokens generated")
        histogram = functools.partial(_histogram, buckets, registry)
        self.time_to_first_token = histogram("time_to_first_token_seconds", "From submission to the first token")
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Time per token after the first")
        self.request_duration = histogram("request_duration_seconds", "From submission to an end by itself")
        self.request_queue = histogram("request_queue_seconds", "From arrival in the scheduler to the first slot")
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt")
        self.request_generation_tokens = histogram("request_generation_tokens", "Tokens of a choice that ended")
        self.batches = BatchMetrics(registry)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type: OpenMetrics for who accepts it."""
        kind = "application/openmetrics-text"
        encode, content_type = choose_encoder(kind if kind in accept else "")
        return encode(self.registry), content_type


def _histogram(
    buckets: Mapping[str, tuple[float, ...]], registry: CollectorRegistry, name: str, words: str, *labels: str
) -> Histogram:
    return Histogram(f"ramet_{name}", words, labels, buckets=buckets[name], registry=registry)
