"""The metrics page without processes: all of it is documented, what it tells of processes is true, how it adds up."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from ramet.frontend import metrics as metrics_module
from ramet.frontend.config import BUCKETS
from ramet.frontend.metrics import Metrics
from ramet.ipc.messages import Counters, Stats, Step

DOCS = Path(__file__).parents[2] / "docs"
ROW = re.compile(r"^\| `(\w+)` \| (counter|gauge|histogram|info) \|([^|]*)\|", re.MULTILINE)
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",), "info": ("_info",)}


def listed(metrics: Metrics) -> dict[str, str]:
    """Type by name; a histogram has the name of its family."""
    families = list(metrics.registry.collect())
    return {it.name + (SUFFIXES[it.type][0] if it.type != "histogram" else ""): it.type for it in families}


def stats(**counts: int) -> Stats:
    zeros = dict.fromkeys(Stats.__struct_fields__, 0) | {"steps": []}
    news = {name: counts.pop(name) for name in Counters.__struct_fields__ if name in counts}
    return Stats(**{**zeros, **counts, "news": Counters(**news)})


def samples(metrics: Metrics) -> dict[str, float]:
    found = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found[sample.name + "".join(f"[{value}]" for value in sample.labels.values())] = sample.value
    return found


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    documented = {name: kind for name, kind, _ in ROW.findall((DOCS / "metrics.md").read_text())}
    assert documented == listed(Metrics())


def test_every_label_is_documented() -> None:
    metrics = Metrics(model="m")
    metrics.processes.watch({"launcher": os.getpid()})
    metrics.http_requests.labels("/x", "200")
    metrics.batches.show({"completed": 1}, None)
    metrics.batches.add_lines(1, 1)
    metrics.engine.update(stats())
    documented = {
        name: set(re.findall(r"`(\w+)`", labels)) for name, _, labels in ROW.findall((DOCS / "metrics.md").read_text())
    }
    for family in metrics.registry.collect():
        name = family.name + (SUFFIXES[family.type][0] if family.type != "histogram" else "")
        assert family.samples, name
        assert set(family.samples[0].labels) - {"le"} == documented[name], name


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    families = list(Metrics().registry.collect())
    known = {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [item["query"]["query"] for item in dashboard["templating"]["list"] if item["type"] == "query"]
    assert len(expressions) > 30
    asked = {name for text in expressions for name in re.findall(r"\b(?:ramet|process)_\w+", text)}
    assert asked - known == set()
    # And nothing that an operator should see is left out of it.
    assert {family.name for family in families if not any(name.startswith(family.name) for name in asked)} == {
        "ramet_batch_lines_in_flight",
        "ramet_batch_oldest_age_seconds",
        "ramet_scheduler_aborted",
        "ramet_scheduler_failed",
        "ramet_scheduler_finished",
        "ramet_scheduler_generated_tokens",
    }
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {"${datasource}"}


def test_both_formats_parse() -> None:
    metrics = Metrics()
    metrics.processes.watch({"launcher": os.getpid()})
    metrics.engine.update(stats(prompt_tokens=3, steps=[Step(0.1, 0.2, 0.3, 4)]))
    text, kind = metrics.page("*/*")
    assert kind.startswith("text/plain")
    plain = {family.name for family in text_string_to_metric_families(text.decode())}
    # As Prometheus 2 and 3 ask, and versions that are not numbers.
    for accept in (
        "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.3",
        "application/openmetrics-text;version=x",
    ):
        text, kind = metrics.page(accept)
        assert kind.startswith("application/openmetrics-text; version=1.0.0")
        families = {family.name: family for family in openmetrics.text_string_to_metric_families(text.decode())}
        assert families.keys() <= plain | {"ramet_build"}
        assert families["ramet_prefix_cache_queries"].samples[0].value == 3


def test_processes_are_told_by_name_and_the_dead_left_out() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    metrics = Metrics()
    metrics.processes.watch({"frontend": os.getpid(), "scheduler-0": child.pid, "detokenizer": 2**22 + 1})
    before = samples(metrics)
    me = psutil.Process()
    assert before["process_resident_memory_bytes[frontend]"] == pytest.approx(me.memory_info().rss, rel=0.1)
    assert before["process_threads[frontend]"] == pytest.approx(me.num_threads(), abs=2)  # one may just have ended
    assert before["process_open_fds[frontend]"] == pytest.approx(me.num_fds(), abs=2)
    assert before["process_cpu_seconds_total[frontend]"] > 0
    assert before["process_open_fds[scheduler-0]"] >= 3
    assert not any("detokenizer" in name for name in before)
    with child:
        child.kill()

    after = samples(metrics)
    assert not any("scheduler-0" in name for name in after)
    assert "process_threads[frontend]" in after


def test_what_the_scheduler_tells_is_added_up() -> None:
    """A scheduler that was restarted begins at 0 again; it tells only what is new."""
    metrics = Metrics({"scheduler_step_rows": (2.0, 5.0)})
    for _ in range(2):
        metrics.engine.update(
            stats(
                running=3,
                pages_total=8,
                pages_free=2,
                pages_cached=4,
                cached_tokens=5,
                steps=[Step(1e-5, 0.1, 0.01, 4)],
            )
        )
    found = samples(metrics)
    assert found["ramet_prefix_cache_hits_total"] == 10
    assert found["ramet_scheduler_step_rows_bucket[2.0]"] == 0
    assert found["ramet_scheduler_step_rows_bucket[5.0]"] == 2
    assert found["ramet_scheduler_step_seconds_sum[run]"] == pytest.approx(0.2)
    assert found["ramet_kv_usage_ratio"] == 0.25
    assert found["ramet_scheduler_requests[running]"] == 3


def test_a_dead_scheduler_has_nothing_and_its_counts_stay() -> None:
    metrics = Metrics()
    metrics.engine.update(stats(running=3, waiting=2, pages_total=8, pages_free=2, finished=7))
    metrics.engine.forget()
    found = samples(metrics)
    assert not any(name.startswith("ramet_kv_pages") for name in found)
    assert found["ramet_kv_usage_ratio"] == 0
    assert found["ramet_scheduler_requests[running]"] == found["ramet_scheduler_requests[waiting]"] == 0
    assert found["ramet_scheduler_finished_total"] == 7


def test_each_histogram_has_the_buckets_asked_for() -> None:
    metrics = Metrics(dict.fromkeys(BUCKETS, (1.5, 7.0)))
    histograms = [family for family in metrics.registry.collect() if family.type == "histogram"]
    assert {family.name.removeprefix("ramet_") for family in histograms} == set(BUCKETS)
    for family in histograms:
        assert {sample.labels["le"] for sample in family.samples if "le" in sample.labels} == {"1.5", "7.0", "+Inf"}


def test_throughput_is_logged_while_there_is_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, logger="ramet.frontend.metrics")
    engine = Metrics().engine

    def hear(seconds: int, **counts: int) -> list[dict[str, float]]:
        """Each second for so many seconds; the fields of the lines that came of it."""
        caplog.clear()
        for _ in range(seconds):
            now[0] += 1
            engine.update(stats(running=2, pages_total=10, pages_free=5, **counts))
        return [record.fields for record in caplog.records]  # type: ignore[attr-defined]

    assert hear(10, generated_tokens=30) == []
    [line] = hear(1, generated_tokens=30, prompt_tokens=10, cached_tokens=5)
    assert line == {
        "running": 2,
        "waiting": 0,
        "prompt_tokens_per_s": 1.0,
        "generated_tokens_per_s": 33.0,
        "kv_usage": 0.5,
        "prefix_hit_rate": 0.5,
    }
    [line] = hear(10, generated_tokens=30)
    assert line["generated_tokens_per_s"] == 30
    now[0] += 3600  # nobody asked anything: the hour is not part of any rate
    assert hear(10, generated_tokens=10) == []
    assert hear(1, generated_tokens=10)[0]["generated_tokens_per_s"] == 11
