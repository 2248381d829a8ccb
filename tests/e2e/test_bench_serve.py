"""`ramet bench serve` against a real server: its figures are those of the server's own counters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.server import RunningServer

pytestmark = pytest.mark.e2e

MAIN = "from ramet.launch.cli import main; main()"


def test_serve_agrees_with_the_servers_own_counters(tiny: RunningServer, tmp_path: Path) -> None:
    results, page = tmp_path / "results.json", tmp_path / "page.html"
    flags = "--num-requests 12 --input-len 20-60 --output-len 4-8 --ignore-eos --concurrency 4 --warmup 0 --details"
    flags += " --shared-prefix-len 64 --num-prefixes 2 --prompts token-ids --token-id-range 5-300"
    before = tiny.quiet_metrics()
    command = [sys.executable, "-c", MAIN, "bench", "serve", "--base-url", tiny.url, *flags.split()]
    command += ["--json", str(results), "--html", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    finished = "ramet_scheduler_finished_total"
    after = tiny.quiet_metrics(finished=int(before.get(finished, 0)) + 12)
    news = {name: value - before.get(name, 0) for name, value in after.items()}
    assert "12 completed, 0 failed" in done.stdout and "counted by usage" in done.stdout
    whole = json.loads(results.read_text())
    summary = whole["summary"]
    assert summary["input_tokens"] == news["ramet_prefix_cache_queries_total"]
    assert summary["cached_tokens"] == news["ramet_prefix_cache_hits_total"] >= 10 * 64
    assert summary["output_tokens"] == news["ramet_scheduler_generated_tokens_total"]
    assert summary["completed"] == news[finished] == 12
    for record in whole["requests"]:
        assert record["input_tokens"] == record["input_len"] and record["output_tokens"] == record["output_len"]
        assert record["arrivals_s"] == sorted(record["arrivals_s"])
        assert sum(record["arrival_tokens"]) == pytest.approx(record["output_tokens"])
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        figures = summary[name]
        assert 0 <= figures["p50"] <= figures["p90"] <= figures["p99"] <= figures["max"]
    assert whole["settings"]["input_len"] == "20-60" and whole["environment"]["usable_cpus"] >= 1
    assert page.read_text().count("<polyline") == 2
