"""From records to figures: percentiles, the summary, tables, the JSON file and the HTML page.

A percentile is the smallest observed value that is not below that share of all, so it is always a value that was seen.
"""

import bisect
import html
import itertools
import math
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

import ramet
from ramet.launch.bench.answer import Record
from ramet.launch.bench.load import Outcome
from ramet.launch.server_args import SECRETS

_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_TIMES = {"ttft_ms": "first token", "itl_ms": "between tokens", "tpot_ms": "per output token", "e2e_ms": "whole answer"}
_PLOTTED = ("ttft_ms", "itl_ms")

# Seconds, and how many tokens or requests they stand for.
Samples = Sequence[tuple[float, float]]


def distribution(samples: Samples) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds; None if there are no samples."""
    if not samples:
        return None
    mean = sum(seconds * weight for seconds, weight in samples) / sum(weight for _, weight in samples)
    return {"mean": 1e3 * mean, **dict(zip(_SHARES, _quantiles(samples, _SHARES.values()), strict=True))}


def _quantiles(samples: Samples, shares: Iterable[float]) -> list[float]:
    """In milliseconds; there are samples."""
    ordered = sorted(samples)
    reached = list(itertools.accumulate(weight for _, weight in ordered))
    return [1e3 * ordered[bisect.bisect_left(reached, share * reached[-1])][0] for share in shares]


def samples_of(records: Iterable[Record]) -> dict[str, list[tuple[float, float]]]:
    """By measure, from the requests that were answered."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in _TIMES}
    for record in records:
        if record.error is not None:
            continue
        found["e2e_ms"].append((record.e2e_s, 1))
        at = record.arrivals_s
        if at:
            found["ttft_ms"].append((at[0], 1))
        if len(at) > 1:
            found["tpot_ms"].append(((at[-1] - at[0]) / max(1, record.output_tokens - 1), 1))
        gaps = zip(at, at[1:], record.arrival_tokens[1:], strict=False)
        found["itl_ms"] += [((later - sooner) / tokens, tokens) for sooner, later, tokens in gaps]
    return found


def summarize(outcome: Outcome) -> dict[str, Any]:
    """All that is reported of a load but the records themselves."""
    wall_s = outcome.wall_s
    answered = [record for record in outcome.records if record.error is None]
    failed = [record for record in outcome.records if record.error not in (None, "interrupted")]
    output_tokens = sum(record.output_tokens for record in answered)
    input_tokens = sum(record.input_tokens or 0 for record in answered)
    return {
        "completed": len(answered),
        "failed": len(failed),
        "interrupted": len(outcome.records) - len(answered) - len(failed),
        "errors": dict(Counter(record.error for record in failed)),
        "error_examples": {record.error: record.message for record in failed},
        "wall_s": wall_s,
        "input_tokens": input_tokens,
        "cached_tokens": sum(record.cached_tokens or 0 for record in answered),
        "output_tokens": output_tokens,
        "tokens_counted_by": " and ".join(sorted({record.counted_by for record in answered})),
        "requests_per_s": len(answered) / wall_s,
        "input_tokens_per_s": input_tokens / wall_s,
        "output_tokens_per_s": output_tokens / wall_s,
        **{name: distribution(samples) for name, samples in samples_of(answered).items()},
        "client_cpu_share": outcome.client_cpu_s / wall_s,
        "client_cpu_us_per_token": 1e6 * outcome.client_cpu_s / max(1, output_tokens),
    }


def load_table(summary: dict[str, Any]) -> str:
    """What `ramet bench serve` prints."""
    s = summary
    lines = [
        f"requests   {s['completed']} completed, {s['failed']} failed, {s['interrupted']} interrupted",
        *(f"failed     {count} x {kind}: {s['error_examples'][kind]}" for kind, count in s["errors"].items()),
        f"time       {s['wall_s']:.2f} s, {s['requests_per_s']:.2f} requests/s",
        f"input      {s['input_tokens']} tokens ({s['cached_tokens']} cached), {s['input_tokens_per_s']:.1f} tokens/s",
        f"output     {s['output_tokens']} tokens, {s['output_tokens_per_s']:.1f} tokens/s, "
        f"counted by {s['tokens_counted_by'] or 'nobody'}",
        f"client     {s['client_cpu_us_per_token']:.0f} us of CPU per token, {s['client_cpu_share']:.1%} of a core",
    ]
    times = [(words, *(f"{ms:.2f}" for ms in s[name].values())) for name, words in _TIMES.items() if s[name]]
    return "\n".join(lines) + "\n\n" + table([("milliseconds", "mean", *_SHARES), *times])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "".join(f"{line}\n" for line in lines)


def check_writable(*paths: str | None) -> None:
    """Before anything is measured. Raises OSError."""
    for path in paths:
        if path is not None:
            Path(path).open("ab").close()


def write_json(path: str | None, settings: Iterable[msgspec.Struct], results: dict[str, Any]) -> None:
    """Every setting but keys, where it was run, and the results; nothing without a path."""
    if path is None:
        return
    shown = {name: value for group in settings for name, value in msgspec.to_builtins(group).items()}
    shown = {name: value for name, value in shown.items() if name not in SECRETS}
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    environment = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"ramet": ramet.__version__, "torch": version("torch"), "python": platform.python_version()},
        "platform": platform.platform(),
        "cpu": cpu[1] if cpu else None,
        "usable_cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
    }
    whole = msgspec.json.encode({"settings": shown, "environment": environment, **results})
    Path(path).write_bytes(msgspec.json.format(whole) + b"\n")


def write_html(path: str, title: str, text: str, records: Iterable[Record]) -> None:
    """One file that needs nothing else: the table, and two distributions as curves."""
    samples = samples_of(records)
    plots = [f"<h2>{_TIMES[name]}</h2>{_plot(samples[name])}" for name in _PLOTTED]
    title = html.escape(title)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>'
    Path(path).write_text(f"{head}<pre>{html.escape(text)}</pre>{''.join(plots)}</html>\n", encoding="utf-8")


def _plot(samples: Samples) -> str:
    """The share of samples up to each time, over a logarithmic axis, as an SVG."""
    if not samples:
        return "<p>no samples</p>"
    times_ms = [max(ms, 1e-3) for ms in _quantiles(samples, [i / 1000 for i in range(1001)])]
    low = math.floor(math.log10(times_ms[0]))
    decades = max(1, math.ceil(math.log10(times_ms[-1])) - low)

    def x(ms: float) -> float:
        return 50 + 640 * (math.log10(ms) - low) / decades

    points = " ".join(f"{x(ms):.1f},{240 - 0.22 * i:.1f}" for i, ms in enumerate(times_ms))
    marks = [(x(10.0**power), 256.0, f"{10.0**power:g} ms") for power in range(low, low + decades + 1)]
    marks += [(20, 244 - 220 * share, f"{share:.0%}") for share in (0.0, 0.5, 0.9, 1.0)]
    texts = "".join(f'<text x="{across:.0f}" y="{down:.0f}">{text}</text>' for across, down, text in marks)
    frame = '<path d="M50 20V240H690M50 130H690M50 42H690" fill="none" stroke="#ccc"/>'
    line = f'<polyline points="{points}" fill="none" stroke="#1f77b4"/>'
    return f'<svg width="740" height="270" font-size="11">{frame}{texts}{line}</svg>'
