"""The command line: `ramet serve`, `launch_server` and `python -m ramet.launch_server` are the same command.

Flags are made from the fields of structs like `ServerArgs`, and a configuration file (`--config`) holds the same
names; the command line wins. Exit codes: 0 a clean stop, 1 a failure with a message, 2 wrong usage. Never imports torch
or transformers.
"""

import argparse
import logging
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

import ramet
from ramet.launch.server_args import ServerArgs

logger = logging.getLogger(__name__)

# By name: what runs it (arguments, program name), and what the help says of it.
Commands = dict[str, tuple[Callable[[list[str], str], None], str]]

# Flags people type by habit from other servers: what they are called here, or that they are not here.
_ELSEWHERE = {
    "block-size": "is --page-size here",
    "gpu-memory-utilization": "is --mem-fraction-static here",
    "kv-cache-dtype": "is not supported by this version",
    "max-model-len": "is --context-length here",
    "max-num-batched-tokens": "is --chunked-prefill-size here",
    "max-num-seqs": "is --max-running-requests here",
    "tensor-parallel-size": "is --tp-size here",
}

# Flags that mean nothing where nobody is served.
_FOR_CLIENTS = {
    *("api_key", "cors_allow_origins", "file_storage_path", "host", "log_requests", "max_file_size"),
    *("max_storage_size", "metrics_buckets", "node_rank", "otlp_traces_endpoint", "port", "ssl_certfile"),
}


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
    for field in msgspec.structs.fields(ServerArgs):
        if field.name in _FOR_CLIENTS and getattr(args, field.name) != field.default:
            parser.error(f"--{field.encode_name.replace('_', '-')} means nothing here: nobody is served")
    sys.exit(run_batch(args, known.input, known.output))


_COMMANDS: Commands = {
    "serve": (_serve, "start a server (the same as launch_server)"),
    "batch": (_batch, "run a batch file without a server"),
    "bench": (_bench, "measure a server, the engine or its steps"),
}


def parse_args(argv: Sequence[str], program: str = "launch_server") -> ServerArgs:
    """Exits with code 2 and a message for what is not understood."""
    (args,) = parse_structs(argv, program, "Serve a language model over the OpenAI API.", ServerArgs)
    assert isinstance(args, ServerArgs)
    return args


def parse_structs(argv: Sequence[str], program: str, description: str, *kinds: type[msgspec.Struct]) -> list[Any]:
    """One object of each kind from the flags and the configuration file; no two have a field of the same name.

    Exits with code 2 and a message for what is not understood.
    """
    parser = _parser(program, description, kinds)
    namespace, unknown = parser.parse_known_args(argv)
    for argument in unknown:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and name in _ELSEWHERE:
            parser.error(f"--{name} {_ELSEWHERE[name]}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    given = vars(namespace)
    path = given.pop("config", None)
    try:
        settings = {**(read_config_file(Path(path)) if path else {}), **given}
        # The last kind also gets the names that nobody has, and refuses them.
        owner = {field.name: kind for kind in kinds for field in msgspec.structs.fields(kind)}
        shares = [{name: x for name, x in settings.items() if owner.get(name, kinds[-1]) is kind} for kind in kinds]
        return [msgspec.convert(share, kind, strict=False) for share, kind in zip(shares, kinds, strict=True)]
    except msgspec.ValidationError as error:
        return _usage_error(parser, error, given)


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


def _usage_error(parser: argparse.ArgumentParser, error: msgspec.ValidationError, given: dict[str, Any]) -> NoReturn:
    """msgspec says `Expected … - at `$.port``; users know the flag."""
    words, _, place = str(error).partition(" - at `$.")
    name = place.rstrip("`").partition("[")[0]
    if name:
        if name in given:
            words = f"{words.partition(', got')[0]}, got {given[name]!r}"
        else:
            words += " (in the configuration file)"
        parser.error(f"argument --{name.replace('_', '-')}: {words}")
    parser.error(words)


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
    hints = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind, include_extras=True).items()}
    for field in (field for kind in kinds for field in msgspec.structs.fields(kind)):
        kind, *_, meta = typing.get_args(hints[field.name])
        name = meta.extra_json_schema["group"]
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        shown = "" if field.default in (None, (), False) else f" ({field.default})"
        group.add_argument(f"--{field.encode_name.replace('_', '-')}", help=meta.description + shown, **_form(kind))
    return parser


def _form(kind: Any) -> dict[str, Any]:
    """How argparse reads a value of this type. Values stay text: msgspec converts and checks them."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # the type, or None
        kind, other = typing.get_args(kind)[:2]
        if kind is bool:  # a switch, which may have a word
            return {"nargs": "?", "const": True, "choices": typing.get_args(other)}
    if typing.get_origin(kind) is typing.Annotated:  # the type with limits, which msgspec checks
        kind = typing.get_args(kind)[0]
    if kind is bool:
        return {"action": "store_true"}
    if typing.get_origin(kind) is tuple:
        return {"nargs": "+", "action": "extend", "metavar": "TEXT"}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if issubclass(kind, str) and kind is not str:  # an enumeration
        return {"choices": [member.value for member in kind]}
    return {"metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
