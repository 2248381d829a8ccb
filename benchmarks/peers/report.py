"""From results to the table, the plot and the verdicts: medians over rounds; of an engine's configurations the best."""

import json
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.install import versions
from benchmarks.peers.servers import CONFIGURATIONS

_DOCS = Path(__file__).parents[2] / "docs"


class Column(NamedTuple):
    title: str
    value: Callable[[dict[str, Any]], float]
    higher_is_better: bool


COLUMNS = {
    "decode": Column("W1 tokens/s", lambda row: 1e3 / row["W1"]["tpot_ms"], True),
    "ttft": Column("W1 first token, ms", lambda row: row["W1"]["ttft_ms"], False),
    "c8": Column("W2 at 8, tokens/s", lambda row: row["W2 c8"]["output_tokens_per_s"], True),
    "c32": Column("W2 at 32, tokens/s", lambda row: row["W2 c32"]["output_tokens_per_s"], True),
    "itl": Column("its p99 between tokens, ms", lambda row: row["W2 c32"]["itl_p99_ms"], False),
    "prefix": Column("W3 s", lambda row: row["W3"]["wall_s"], False),
    "prefill": Column("W4 tokens/s", lambda row: row["W4"]["input_tokens_per_s"], True),
    "short": Column("W5 requests/s", lambda row: row["W5"]["requests_per_s"], True),
    "ready": Column("ready s", lambda row: row["ready_s"], False),
    "memory": Column("memory MiB", lambda row: row["memory_mib"], False),
}
_PEERS = ("llama.cpp", "vLLM CPU")
_Q4 = ("llama.cpp, the Q4_1 file",)


class Verdict(NamedTuple):
    """`column` of `engine` is to be so many times better than that of the best of `others`."""

    engine: str
    column: str
    times: float
    others: tuple[str, ...]


VERDICTS = (
    Verdict("Ramet", "decode", 0.95, ("llama.cpp",)),
    Verdict("Ramet", "decode", 2.0, ("vLLM CPU",)),
    Verdict("Ramet int4, the Q4_1 file", "decode", 1.4, _Q4),
    Verdict("Ramet", "c32", 1.25, _PEERS),
    Verdict("Ramet int8", "c32", 2.0, _PEERS),
    Verdict("Ramet", "itl", 2.0, _PEERS),
    Verdict("Ramet", "prefix", 2.5, _PEERS),
    Verdict("Ramet", "prefill", 1.25, _PEERS),
    Verdict("Ramet int8", "prefill", 2.0, _PEERS),
    Verdict("Ramet", "short", 1.3, _PEERS),
)

Table = dict[str, dict[str, float]]


def report(results: Path, model: str) -> None:
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    table = best(rows)
    text = markdown(table, rows)
    print(text)
    if model == "smollm2":
        judged = verdicts(table)
        print(judged)
        text += "\n" + judged + "\n![the same as bars](peers.svg)\n"
        (_DOCS / "peers.svg").write_text(plot(table))
    page = (_DOCS / "performance.md").read_text()
    begin, end = f"<!-- peers {model} -->\n", f"<!-- end of peers {model} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"docs/performance.md lacks the markers {begin.strip()} and {end}")
    (_DOCS / "performance.md").write_text(before + begin + text + end + after)


def best(rows: list[dict[str, Any]]) -> Table:
    """The median of each configuration, and of an engine's configurations the better one, column by column."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, configuration in CONFIGURATIONS.items():
        mine = [row for row in rows if row["configuration"] == name]
        for key, column in COLUMNS.items():
            values = [value for row in mine if (value := _value(column, row)) is not None]
            if values:
                found[configuration.engine][key].append(statistics.median(values))
    pick = {key: max if column.higher_is_better else min for key, column in COLUMNS.items()}
    return {engine: {key: pick[key](values) for key, values in columns.items()} for engine, columns in found.items()}


def _value(column: Column, row: dict[str, Any]) -> float | None:
    try:
        return column.value(row)
    except KeyError:
        return None  # that workload was not part of the round


def markdown(table: Table, rows: list[dict[str, Any]]) -> str:
    lines = ["| | " + " | ".join(column.title for column in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for engine, columns in table.items():
        cells = [_number(columns[key]) if key in columns else "–" for key in COLUMNS]
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    counts = sorted({sum(row["configuration"] == name for row in rows) for name in {r["configuration"] for r in rows}})
    days = sorted({row["at"][:10] for row in rows})
    rounds = "–".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))
    where = f"{_cpu()}; " + ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join(
        [*lines, "", f"Medians of {rounds} rounds, {' to '.join(dict.fromkeys([days[0], days[-1]]))}; {where}.", ""]
    )


def verdicts(table: Table) -> str:
    lines = ["| Ramet against the best of | figure | wanted | found | |", "|---|---|---|---|---|"]
    for verdict in VERDICTS:
        column = COLUMNS[verdict.column]
        others = [table[name][verdict.column] for name in verdict.others if verdict.column in table.get(name, {})]
        mine = table.get(verdict.engine, {}).get(verdict.column)
        if mine is None or not others:
            continue
        ratio = mine / max(others) if column.higher_is_better else min(others) / mine
        passed = "yes" if ratio >= verdict.times else "**no**"
        title = f"{verdict.engine}: {column.title}"
        lines.append(f"| {', '.join(verdict.others)} | {title} | {verdict.times} | {ratio:.2f} | {passed} |")
    return "\n".join([*lines, ""])


def plot(table: Table) -> str:
    """Bars of the columns where more is better, each relative to its longest, as SVG."""
    measured = {key for columns in table.values() for key in columns}
    shown = {key: column for key, column in COLUMNS.items() if column.higher_is_better and key in measured}
    colours = ["#1f77b4", "#2ca02c", "#17becf", "#ff7f0e", "#ffbb78", "#d62728"]
    parts, y = [], 10
    for key, column in shown.items():
        parts.append(f'<text x="10" y="{y + 12}" font-weight="bold">{column.title}</text>')
        longest = max(columns.get(key, 0.0) for columns in table.values())
        for colour, (engine, columns) in zip(colours, table.items(), strict=False):
            y += 18
            value = columns.get(key, 0.0)
            parts.append(f'<rect x="210" y="{y}" width="{350 * value / longest:.0f}" height="14" fill="{colour}"/>')
            parts.append(f'<text x="20" y="{y + 12}">{engine}</text>')
            parts.append(f'<text x="{215 + 350 * value / longest:.0f}" y="{y + 12}">{_number(value)}</text>')
        y += 30
    style = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y}" {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{len(names)} CPUs, {names[0]}, Linux {platform.release()}"
