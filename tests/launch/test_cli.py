"""Flags, configuration files and the exit codes of the commands."""

import subprocess
import sys
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.server import free_port

import ramet
from ramet.frontend.config import ReasoningFamily, ToolCallForm
from ramet.launch import cli
from ramet.launch.server_args import ServerArgs, request_log_level
from ramet.scheduler.config import Policy


def usage_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.parse_args(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_no_flags_are_the_defaults() -> None:
    assert cli.parse_args([]) == ServerArgs()


def test_every_field_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in msgspec.structs.fields(ServerArgs):
        assert f"--{field.name.replace('_', '-')}" in text


def test_values_are_converted() -> None:
    line = "--model-path m --port 80 --api-key a b --api-key c --schedule-policy lpm --mem-fraction-static 0.3 "
    line += "--max-running-requests 8 --disable-radix-cache --drain-timeout 2"
    args = cli.parse_args(line.split())
    assert (args.model_path, args.port, args.api_key) == ("m", 80, ("a", "b", "c"))
    assert (args.schedule_policy, args.mem_fraction_static) == (Policy.LPM, 0.3)
    assert (args.max_running_requests, args.disable_radix_cache, args.drain_timeout) == (8, True, 2.0)


@pytest.mark.parametrize(("name", "words"), [("tool_call_parser", ToolCallForm), ("reasoning_parser", ReasoningFamily)])
def test_every_parser_can_be_named(name: str, words: Any) -> None:
    for word in ("auto", *typing.get_args(words)):
        assert getattr(cli.parse_args([f"--{name.replace('_', '-')}", word]), name) == word


def test_prefixes_are_flags() -> None:
    assert cli.parse_args(["--tp", "1", "--model", "m"]) == ServerArgs(model_path="m")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--port", "abc"], "argument --port: Expected `int`, got 'abc'"),
        (["--port", "70000"], "argument --port: Expected `int` <= 65535, got '70000'"),
        (["--mem-fraction-static", "1.5"], "argument --mem-fraction-static: Expected `float` < 1.0, got '1.5'"),
        (["--drain-timeout", "inf"], "argument --drain-timeout: Expected `float` <= 86400.0, got 'inf'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--tp-size", "0"], "argument --tp-size: Expected `int` >= 1, got '0'"),
        (["--tp-size", "3", "--nnodes", "2"], "tp_size 3 cannot be divided over nnodes 2"),
        (["--tp", "2", "--nnodes", "2", "--node-rank", "2"], "node_rank is 2, but nnodes 2 are counted from 0"),
        (["--tp", "2", "--dist-init-addr", "a:1"], "dist_init_addr is for several machines: give --nnodes too"),
        (["--dp", "4"], "dp_size is 4, but this version supports only 1"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--mem-fraction-statc=0.5"], "--mem-fraction-statc=0.5; did you mean --mem-fraction-static?"),
        (["--prot", "80"], "--prot 80; did you mean --port?"),
        (["-np", "4"], "-np is --max-running-requests here"),
        (["-ngl", "99"], "-ngl is not here: the model runs on --device as a whole"),
        (["--enable-lora"], "--enable-lora is not built"),
        (["--speculative-algorithm", "EAGLE"], "--speculative-algorithm is not built"),
        (["org/model", "--tp", "1"], "unrecognized arguments: org/model (a model is named by --model-path)"),
        (["--max-model-len=100"], "--max-model-len is --context-length here"),
        (["--ctx-size", "4096"], "--ctx-size is --context-length here"),
        (["-c", "4096"], "-c is --context-length here"),
        (["-m", "model.gguf"], "-m is --model-path here"),
        (["--enable-prefix-caching"], "--enable-prefix-caching is not needed: known prefixes are reused"),
        (["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype is not supported by this version"),
        (["--api-key", "a", ""], "api_key must not be empty"),
        (["--served-model-name", " "], "served_model_name must not be empty"),
        (["--model-path", ""], "model_path must not be empty"),
        (["--reasoning-parser", "thoughts"], "invalid choice: 'thoughts' (choose from 'auto', 'deepseek-r1'"),
        (["--cpu-bind", "0-"], "cpu_bind '0-' is not a list of CPUs"),
        (["--log-requests", "all"], "--log-requests: invalid choice: 'all'"),
        (
            ["--metrics-buckets", "ttft=1"],
            "metrics_buckets 'ttft' is not a histogram: one of time_to_first_token_seconds",
        ),
        (["--metrics-buckets", "scheduler_step_rows=1,x"], "'scheduler_step_rows=1,x' is not of the form"),
        (["--metrics-buckets", "scheduler_step_rows=2,1"], "scheduler_step_rows must be finite and ascend, got 2,1"),
        (["--otlp-traces-endpoint", "localhost:4318"], "'localhost:4318' is not a URL such as http://localhost:4318"),
        (["--cpu-bind", "0,9999"], "cpu_bind '0,9999' names CPUs outside"),
        (["--config", "/nowhere.yaml"], "cannot read the configuration file /nowhere.yaml"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert words in usage_error(capsys, *argv)


def test_values_of_unknown_flags_are_no_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error(capsys, "--no-such-flag", "5").endswith("unrecognized arguments: --no-such-flag 5")


@pytest.mark.parametrize(
    ("argv", "level"),
    [([], "off"), (["--log-requests"], "summary"), (["--log-requests", "parameters", "--port", "81"], "parameters")],
)
def test_log_requests_is_a_switch_that_may_have_a_word(argv: list[str], level: str) -> None:
    assert request_log_level(cli.parse_args(argv)) == level


def test_traces_without_the_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    words = usage_error(capsys, "--otlp-traces-endpoint", "http://localhost:4318/v1/traces")
    assert "pip install '.[otel]'" in words


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "port: 81\nserved-model-name: [x, y]\nlog_requests: true\nhost: null\n"),
        ("c.json", '{"port": 81, "served_model_name": ["x", "y"], "log-requests": true}'),
    ],
)
def test_the_command_line_wins_over_the_file(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    args = cli.parse_args(["--config", str(path)])
    assert args == ServerArgs(port=81, served_model_name=("x", "y"), log_requests=True)
    assert cli.parse_args(["--port", "82", "--config", str(path)]).port == 82


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 81", "the configuration file has an unknown setting `prot`"),
        ("port: many", "argument --port: Expected `int`, got `str` (in the configuration file)"),
        ("dp-size: 2", "dp_size is 2"),
        ("- port", "does not hold names with values"),
        ("port: [", "cannot read the configuration file"),
    ],
)
def test_errors_in_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert words in usage_error(capsys, "--config", str(path))


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=300, check=False)


def test_the_commands_are_the_same() -> None:
    # Each says "error" in its own name; what follows is equal.
    arguments = ["--model-path", "/nowhere/at/all", "--port", str(free_port())]
    by_module = run("-m", "ramet.launch_server", *arguments)
    ramet_command = f"import ramet.launch.cli as c; c.main(['serve', *{arguments}])"
    by_command = run("-c", ramet_command)
    assert by_module.returncode == by_command.returncode == 1
    assert by_module.stderr == by_command.stderr
    assert by_module.stderr.startswith("error: /nowhere/at/all does not exist")
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert pyproject["project"]["scripts"] == {
        "ramet": "ramet.launch.cli:main",
        "launch_server": "ramet.launch.cli:launch_server",
    }


@pytest.mark.parametrize("command", [cli.main, cli.launch_server])
def test_version(capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], None]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ramet {ramet.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["sevre"]])
def test_an_unknown_command(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2


def test_the_launcher_imports_no_torch() -> None:
    """Its memory and its start-up time would grow severalfold."""
    code = (
        "import sys, ramet.launch.serve, ramet.launch.child\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'numpy') if name in sys.modules])"
    )
    assert run("-c", code).stdout.strip() == "[]"
