"""`ramet bench serve | offline | step`: their flags, and what is done with the results.

Exit codes: 0 all requests were answered, 1 some were not, or a failure with a message, 2 wrong usage, 130 interrupted.
Imports torch only when the placement of this process is settled, as the launcher settles it for the scheduler's.
"""

import argparse
import os
import sys
from typing import Annotated

import msgspec

from ramet.launch.bench.http_client import RequestFailed
from ramet.launch.bench.load import LoadArgs, run_load
from ramet.launch.bench.report import check_writable, load_table, summarize, write_html, write_json
from ramet.launch.bench.workload import Workload, flag
from ramet.launch.cache import ModelUnavailable
from ramet.launch.cli import Commands, parse_structs, run_command
from ramet.launch.config import EngineConfig
from ramet.launch.logs import set_up_logging
from ramet.launch.serve import INTERRUPTED, configure
from ramet.launch.server_args import ConfigError, ServerArgs
from ramet.model_runner.weights.errors import WeightsError


class StepArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The flags of `ramet bench step` beside those of a server."""

    batch_sizes: Annotated[str, flag("requests that decode in a step")] = "1,2,4,8,16,32"
    contexts: Annotated[str, flag("tokens of each request")] = "128,1024"
    repeats: Annotated[int, flag("steps of each kind", ge=1)] = 30
    json: Annotated[str | None, flag("write the results to this file")] = None

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "contexts"):
            sizes(name, getattr(self, name))


def sizes(name: str, text: str) -> list[int]:
    """`1,2,4` as numbers. Raises ValueError."""
    if not all(part.isdecimal() and int(part) >= 1 for part in text.split(",")):
        raise ValueError(f"{name} {text!r} is not a list of numbers from 1 up, like 1,2,4")
    return [int(part) for part in text.split(",")]


def bench(argv: list[str], program: str) -> None:
    """The command `ramet bench`; ends the process."""
    parser = argparse.ArgumentParser(prog=program, description="Measure a server, the engine or its steps.")
    try:
        run_command(parser, _COMMANDS, argv)
    except (RequestFailed, ModelUnavailable, WeightsError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _serve(argv: list[str], program: str) -> None:
    load, args = parse_structs(argv, program, "Load any OpenAI-compatible server, and time it.", Workload, LoadArgs)
    check_writable(load.json, args.html)
    outcome = run_load(load, args)
    summary = summarize(outcome)
    text = load_table(summary)
    sys.stdout.write(text)
    records = {"requests": outcome.records} if args.details else {}
    write_json(load.json, (load, args), {"model": outcome.model, "summary": summary, **records})
    if args.html is not None:
        write_html(args.html, f"{outcome.model} at {args.base_url}", text, outcome.records)
    if summary["interrupted"]:
        sys.exit(INTERRUPTED)
    sys.exit(0 if summary["completed"] == load.num_requests else 1)


def _offline(argv: list[str], program: str) -> None:
    load, server = parse_structs(argv, program, "Run the engine without HTTP.", Workload, ServerArgs)
    check_writable(load.json)
    config = _settle(server)
    from ramet.launch.bench.offline import run_offline

    summary = run_offline(config, load)
    sys.stdout.write("".join(f"{name:<20} {round(value, 2)}\n" for name, value in summary.items()))
    write_json(load.json, (load, server, config.runner), {"summary": summary})


def _step(argv: list[str], program: str) -> None:
    args, server = parse_structs(argv, program, "Time single steps beside the machine's floor.", StepArgs, ServerArgs)
    check_writable(args.json)
    config = _settle(server)
    from ramet.launch.bench.step import run_steps, step_table

    batch_sizes, contexts = sizes("batch_sizes", args.batch_sizes), sizes("contexts", args.contexts)
    results = run_steps(config, batch_sizes, contexts, args.repeats)
    sys.stdout.write(step_table(results))
    write_json(args.json, (args, server, config.runner), results)


_COMMANDS: Commands = {
    "serve": (_serve, "load a server, any that speaks the OpenAI API"),
    "offline": (_offline, "run the engine in this process, without HTTP"),
    "step": (_step, "time single steps beside what the machine allows"),
}


def _settle(server: ServerArgs) -> EngineConfig:
    """The configuration of a server with these flags; this process becomes like its scheduler."""
    set_up_logging("bench", server.log_level)
    config = configure(server)
    if config.frontend.is_embedding:
        raise ConfigError("only models that generate are measured; this one embeds")
    if config.scheduler.tp.size > 1:
        raise ConfigError(f"tp_size is {config.scheduler.tp.size}, but this runs in one process")
    assert "torch" not in sys.modules, "OpenMP reads its settings when torch is imported"
    os.environ.update(config.placement.env)
    config.placement.apply()
    return config
