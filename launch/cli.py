"""The command line: `ramet serve`, `launch_server` and `python -m ramet.launch_server` are the same command.

Flags are made from the fields of structs like `ServerArgs`, and a configuration file (`--config`) holds the same
names; the command line wins. Exit codes: 0 a clean stop, 1 a failure with a message, 2 wrong usage. Never imports torch
or transformers.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

import ramet
from ramet.launch.server_args import ServerArgs

# By name: what runs it (arguments, program name), and what the help says of it.
Commands = dict[str, tuple[Callable[[list[str], str], None], str]]

# Flags people type by habit from other servers: what they are called here, or that they are not here.
_ELSEWHERE = {
    **dict.fromkeys(("--max-model-len", "--ctx-size", "-c"), "is --context-length here"),
    **dict.fromkeys(("-ngl", "--gpu-layers", "--n-gpu-layers"), "is not here: the model runs on --device as a whole"),
    **dict.fromkeys(("-np", "--parallel", "--max-num-seqs"), "is --max-running-requests here"),
    **dict.fromkeys(("--enable-lora", "--lora-modules", "--lora-paths"), "is not built: there are no adapters"),
    **dict.fromkeys(("--speculative-algorithm", "--speculative-config"), "is not built"),
    "--block-size": "is --page-size here",
    "--enable-prefix-caching": "is not needed: known prefixes are reused but for --disable-radix-cache",
    "--gpu-memory-utilization": "is --mem-fraction-static here",
    "--kv-cache-dtype": "is not supported by this version",
    "--max-num-batched-tokens": "is --chunked-prefill-size here",
    "--tensor-parallel-size": "is --tp-size here",
    "-m": "is --model-path here",
}

# Flags that mean nothing where nobody is served.
_FOR_CLIENTS = (
    *("api_key", "cors_allow_origins", "file_storage_path", "host", "log_requests", "max_file_size"),
    *("max_storage_size", "metrics_buckets", "node_rank", "otlp_traces_endpoint", "port", "ssl_certfile"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `ramet`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="ramet", description="Serve large language models over the OpenAI API.")
    parser.add_argument("--version", action="version", version=f"ramet {ramet.__version__}")
    run_command(parser, _COMMANDS, arguments)


def run_command(parser: argparse.ArgumentParser, commands: Commands, arguments: list[str]) -> None:
    """Run the command that the first argument names, with the others."""
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (run, words) in commands.items():
        choices.add_parser(name, help=words, add_help=False).set_defaults(run=run)
    known = parser.parse_args(arguments[:1])
    known.run(arguments[1:], f"{parser.prog} {arguments[0]}")


def launch_server(argv: Sequence[str] | None = None) -> None:
    """The command `launch_server`."""
    _serve(list(sys.argv[1:] if argv is None else argv), "launch_server")


def _serve(argv: list[str], program: str) -> None:
    from ramet.launch.serve import serve

    sys.exit(serve(parse_args(argv, program)))


def _bench(argv: list[str], program: str) -> None:
    from ramet.launch.bench.cli import bench

    bench(argv, program)


def _batch(argv: list[str], program: str) -> None:
    from ramet.launch.batch_run import run_batch

    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s run INPUT -o OUTPUT [options of launch_server]",
        description="Run the lines of a batch file without a server; the same command goes on after a stop.",
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=["run"], help="run a batch")
    parser.add_argument("input", type=Path, help="JSONL file, as for POST /v1/batches")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file for the results")
    known, rest = parser.parse_known_args(argv)
    args = parse_args(rest, program)
    for name in _FOR_CLIENTS:
        if getattr(args, name) != getattr(ServerArgs(), name):
            parser.error(f"{_flag(name)} means nothing here: nobody is served")
    sys.exit(run_batch(args, known.input, known.output))


_COMMANDS: Commands = {
    "serve": (_serve, "start a server (the same as launch_server)"),
    "batch": (_batch, "run a batch file without a server"),
    "bench": (_bench, "measure a server, the engine or its steps"),
}


def parse_args(argv: Sequence[str], program: str = "launch_server") -> ServerArgs:
    """Exits with code 2 and a message for what is not understood."""
    args: ServerArgs = parse_structs(argv, program, "Serve a language model over the OpenAI API.", ServerArgs)[0]
    return args


def parse_structs(argv: Sequence[str], program: str, description: str, *kinds: type[msgspec.Struct]) -> list[Any]:
    """One object of each kind from the flags and the configuration file; no two have a field of the same name.

    Exits with code 2 and a message for what is not understood.
    """
    parser = _parser(program, description, kinds)
    namespace, unknown = parser.parse_known_args(argv)
    for name in (argument.partition("=")[0] for argument in unknown):
        if name in _ELSEWHERE:
            parser.error(f"{name} {_ELSEWHERE[name]}")
    if unknown:
        flags = [_flag(name) for kind in kinds for name in kind.__struct_fields__]
        hint = "" if unknown[0].startswith("-") or ServerArgs not in kinds else " (a model is named by --model-path)"
        for near in difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1):
            hint = f"; did you mean {near}?"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    given = vars(namespace)
    path = given.pop("config", None)
    try:
        settings = {**(read_config_file(Path(path)) if path else {}), **given}
        shares = [{name: settings.pop(name) for name in kind.__struct_fields__ if name in settings} for kind in kinds]
        shares[-1] |= settings  # the names that nobody has, which are refused
        return [msgspec.convert(share, kind, strict=False) for share, kind in zip(shares, kinds, strict=True)]
    except msgspec.ValidationError as error:
        parser.error(_words(error, given))


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML or JSON file, its names with dashes or underscores. Raises msgspec.ValidationError."""
    try:
        data = path.read_bytes()
        # JSON is nearly a part of YAML, but for tabs.
        settings = msgspec.json.decode(data) if path.suffix == ".json" else msgspec.yaml.decode(data)
    except (OSError, msgspec.DecodeError) as error:
        words = " ".join(str(error).split())
        raise msgspec.ValidationError(f"cannot read the configuration file {path}: {words}") from error
    if not isinstance(settings, dict):
        raise msgspec.ValidationError(f"the configuration file {path} does not hold names with values")
    return {str(name).replace("-", "_"): value for name, value in settings.items() if value is not None}


def _words(error: msgspec.ValidationError, given: dict[str, Any]) -> str:
    """msgspec says `Expected … - at `$.port``; users know the flag."""
    words, _, place = str(error).partition(" - at `$.")
    name = place.rstrip("`").partition("[")[0]
    if not name:
        return words.replace("Object contains unknown field", "the configuration file has an unknown setting")
    if name in given:
        words = f"{words.partition(', got')[0]}, got {given[name]!r}"
    else:
        words += " (in the configuration file)"
    return f"argument {_flag(name)}: {words}"


def _parser(program: str, description: str, kinds: Sequence[type[msgspec.Struct]]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s [--model-path MODEL] [options]" if ServerArgs in kinds else "%(prog)s [options]",
        description=description,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"ramet {ramet.__version__}")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with any of these settings")
    groups: dict[str, Any] = {}
    infos: list[Any] = [inspect.type_info(kind) for kind in kinds]
    for field in (field for info in infos for field in info.fields):
        about = field.type.extra_json_schema
        name = about["group"]
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        shown = "" if field.default in (None, (), False) else f" ({field.default})"
        group.add_argument(_flag(field.name), help=about["description"] + shown, **_form(field.type.type))
    return parser


def _form(kind: inspect.Type) -> dict[str, Any]:
    """How argparse reads a value of this type. Values stay text: msgspec converts and checks them, limits too."""
    kinds = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    words = [word for item in kinds if isinstance(item, inspect.LiteralType) for word in item.values]
    match kinds[0]:
        case inspect.BoolType():  # a switch, which may have a word
            return {"nargs": "?", "const": True, "choices": words} if words else {"action": "store_true"}
        case inspect.LiteralType():
            return {"choices": words}
        case inspect.EnumType(cls=cls):
            return {"choices": [member.value for member in cls]}
        case inspect.VarTupleType():
            return {"nargs": "+", "action": "extend", "metavar": "TEXT"}
        case first:
            return {"metavar": {inspect.IntType: "N", inspect.FloatType: "X", inspect.StrType: "TEXT"}[type(first)]}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
