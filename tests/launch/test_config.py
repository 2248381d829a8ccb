"""`resolve()`: what is chosen when the user leaves it open, and what is refused."""

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ramet.frontend.port import bind
from ramet.ipc.channel import Addresses
from ramet.launch import config as config_module
from ramet.launch import hardware
from ramet.launch.cache import ModelUnavailable
from ramet.launch.config import resolve
from ramet.launch.hardware import cpu_has_bfloat16
from ramet.launch.model_info import EmbeddingInfo, ModelInfo
from ramet.launch.model_source import ResolvedModel
from ramet.launch.placement import computing, light, parse_cpus
from ramet.launch.roles import engine_processes
from ramet.launch.serve import configure
from ramet.launch.server_args import ConfigError, ServerArgs
from ramet.launch.tensor_parallel import check_meeting_point
from ramet.model_runner.config import LoadFormat

INFO = ModelInfo(
    context_length=2048,
    vocab_size=100,
    dtype="bfloat16",
    eos_ids=(2, 7),
    default_sampling={"temperature": 0.6},
)


def model(**facts: object) -> ResolvedModel:
    return ResolvedModel(
        name="org/model",
        weights="/w",
        load_format=LoadFormat.SAFETENSORS,
        model_dir="/m",
        tokenizer_dir="/t",
        info=msgspec.structs.replace(INFO, **facts),
    )


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(config_module, "cpu_has_bfloat16", lambda: request.param)


def test_the_defaults_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        config = resolve(ServerArgs(device="cpu"), model())
    assert config.scheduler.page_size == config.runner.page_size == 16
    assert config.scheduler.max_step_tokens == config.runner.max_step_tokens == 512
    assert config.scheduler.max_prefill_tokens == 256
    assert config.scheduler.max_running == config.runner.max_running == 64
    assert config.scheduler.eos_ids == (2, 7)
    assert config.runner.memory_fraction == 0.5
    assert config.frontend.served_names == ("org/model",)
    assert config.frontend.default_sampling == {"temperature": 0.6}
    lengths = (config.frontend, config.tokenizer, config.scheduler, config.runner)
    assert {part.context_length for part in lengths} == {2048}
    assert "context_length: 2048 (automatic)" in caplog.text


def test_the_defaults_on_cuda() -> None:
    config = resolve(ServerArgs(device="cuda"), model())
    assert (config.scheduler.max_step_tokens, config.scheduler.max_prefill_tokens) == (8192, 2048)
    assert (config.scheduler.max_running, config.runner.dtype) == (256, "bfloat16")


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMET_DIST_SECRET", "sixteen characters")


TWO_NODES = {"tp_size": 4, "nnodes": 2, "dist_init_addr": "localhost:5000", "device": "cpu", "num_threads": 5}


@pytest.mark.usefixtures("secret")
def test_ranks_on_two_machines() -> None:
    """Machine 0 has the whole engine, machine 1 only ranks; a secret goes to nobody else."""
    both = [
        engine_processes(resolve(ServerArgs(node_rank=rank, **TWO_NODES), model()), Addresses("/x"))
        for rank in range(2)
    ]
    names = [[process.name for process in processes] for processes in both]
    assert names == [
        ["scheduler-0", "scheduler-1", "frontend", "detokenizer", "tokenizer-0"],
        ["scheduler-2", "scheduler-3"],
    ]
    for process in both[0] + both[1]:
        assert ("sixteen characters" in str(process.arguments)) == process.name.startswith("scheduler-")
        if process.name.startswith("scheduler-"):
            assert process.placement.env["OMP_NUM_THREADS"] == "2"
    place, runner, _ = both[1][1].arguments
    assert (place["rank"], place["size"], place["address"]) == (3, 4, "tcp://127.0.0.1:5000")
    assert (runner["device_index"], runner["memory_fraction"]) == (1, 0.25)


def test_ranks_on_one_machine_have_a_gpu_each() -> None:
    config = resolve(ServerArgs(tp_size=2, base_gpu_id=4, device="cuda"), model())
    first, second, *_ = engine_processes(config, Addresses("/x"))
    assert (first.arguments[0]["tp"]["address"], first.arguments[1]["device_index"]) == ("ipc:///x/ranks", 4)
    assert (second.name, second.arguments[0]["rank"], second.arguments[1]["device_index"]) == ("scheduler-1", 1, 5)
    assert second.arguments[1]["memory_fraction"] == 0.95


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"dist_init_addr": None}, "dist_init_addr must be HOST:PORT of machine 0, the same on all machines, got None"),
        ({"dist_init_addr": "host"}, "got host"),
        ({"dist_init_addr": "host.invalid:99999"}, "got host.invalid:99999"),
        ({"dist_init_addr": "host.invalid:80"}, "dist_init_addr 'host.invalid:80': "),
        ({"dist_secret_file": "/nowhere"}, "dist_secret_file '/nowhere' cannot be read"),
        ({"dist_secret_file": "/dev/null"}, "of at least 16 characters, got 0; `openssl rand -hex 32` makes one"),
        ({"is_embedding": True}, "tp_size is 4, but models that embed run on one device"),
        ({"base_gpu_id": 1}, "base_gpu_id is 1, but the model runs on a CPU"),
    ],
)
@pytest.mark.usefixtures("secret")
def test_machines_that_cannot_work_together(args: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        resolve(ServerArgs(**{**TWO_NODES, **args}), model())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "fits"), [(8, 4, True), (8, 2, True), (8, None, True), (6, 2, False), (12, 3, False)]
)
def test_heads_are_divided_over_ranks(heads: int, kv_heads: int | None, fits: bool) -> None:
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=f"tp_size is 4, .* {heads} query "):
        resolve(ServerArgs(tp_size=4, device="cpu"), model(num_heads=heads, num_kv_heads=kv_heads))


@pytest.mark.parametrize(
    ("rank", "address", "words"),
    [
        (0, "192.0.2.1:5000", "machine 0 cannot listen on it: Cannot assign requested address"),
        (1, "255.255.255.255:5000", "machine 1 cannot reach it: Permission denied"),  # as if there were no route
        (1, "host.invalid:5000", ""),
    ],
)
def test_meeting_points_that_cannot_be(rank: int, address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"dist_init_addr '{address}': {words}")):
        check_meeting_point(ServerArgs(**{**TWO_NODES, "node_rank": rank, "dist_init_addr": address}))


def test_a_meeting_point_in_use() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        check_meeting_point(ServerArgs(**{**TWO_NODES, "node_rank": 1, "dist_init_addr": address}))
        with pytest.raises(ConfigError, match="machine 0 cannot listen on it: Address already in use"):
            check_meeting_point(ServerArgs(**{**TWO_NODES, "dist_init_addr": address}))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"quantization": "fp8", "device": "cpu"}, "fp8 needs cuda and bfloat16, got cpu and bfloat16"),
        (
            {"quantization": "fp8", "device": "cuda", "dtype": "float16"},
            "needs cuda and bfloat16, got cuda and float16",
        ),
        ({"quantization": "int8", "device": "cuda"}, "int8 needs cpu and bfloat16, got cuda and bfloat16"),
        ({"quantization": "int4", "dtype": "float32"}, "int4 needs cpu and bfloat16, got cpu and float32"),
        ({"quantization": "int8", "tp_size": 2}, "int8 needs tp_size to be 1, got 2"),
        (
            {"quantization": "int4", "attention_backend": "torch"},
            "int4 needs attention_backend to be auto or cpu, got torch",
        ),
        ({"quantization": "int8", "page_size": 24}, "int8 needs page_size to be a multiple of 16, got 24"),
    ],
)
def test_rounding_that_the_device_cannot_compute(args: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=f"quantization .*{words}"):
        resolve(ServerArgs(**{"device": "cpu", "dtype": "bfloat16", **args}), model(num_heads=4))


@pytest.mark.parametrize(("device", "backends"), [("cpu", ("triton", "fa3", "flashinfer")), ("cuda", ("cpu",))])
def test_attention_that_the_device_cannot_compute(device: Any, backends: tuple[Any, ...]) -> None:
    for name in ("auto", "cpu", "torch", "triton", "fa3", "flashinfer"):
        args = ServerArgs(device=device, attention_backend=name)
        if name not in backends:
            assert resolve(args, model()).runner.attention_backend == name
            continue
        with pytest.raises(ConfigError, match=f"attention_backend {name} is not for {device}, where the model runs"):
            resolve(args, model())


@pytest.mark.parametrize(
    ("torch_has", "library", "files", "words"),
    [
        ((), True, True, "built without CUDA"),
        (("cuda",), False, False, r"no NVIDIA driver \(.*libcuda"),
        (("cuda",), True, False, None),  # as with WSL
        (("cuda",), False, True, None),  # a system whose torch alone knows where the library is
        (("hip",), False, False, None),
    ],
)
def test_a_machine_without_cuda(
    monkeypatch: pytest.MonkeyPatch, torch_has: tuple[str, ...], library: bool, files: bool, words: str | None
) -> None:
    """Known before a model is looked for; a machine of which it is not certain goes on."""

    def load(name: str) -> None:
        assert name == "libcuda.so.1"
        if not library:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(hardware, "_torch_has", lambda platforms: bool({*torch_has} & {*platforms.split("|")}))
    monkeypatch.setattr(hardware, "_NVIDIA_DRIVER", (Path("/") if files else Path("/nowhere"),))
    monkeypatch.setattr("ctypes.CDLL", load)
    args = ServerArgs(device="cuda", model_path="/nowhere/at/all")
    kind, found = (ModelUnavailable, "does not exist") if words is None else (ConfigError, f"device is cuda, .*{words}")
    with pytest.raises(kind, match=found):
        configure(args)
    with pytest.raises(ModelUnavailable):
        configure(msgspec.structs.replace(args, device="auto"))


@pytest.mark.parametrize(("quantization", "device"), [("fp8", "cuda"), ("int8", "cpu")])
def test_experts_are_not_rounded(quantization: Any, device: Any) -> None:
    with pytest.raises(ConfigError, match=f"quantization {quantization} is for dense models, .* has 8 experts"):
        resolve(ServerArgs(quantization=quantization, device=device, dtype="bfloat16"), model(num_experts=8))


@pytest.mark.parametrize(("quantization", "device"), [("fp8", "cuda"), ("int8", "cpu"), ("int4", "cpu")])
def test_rounding_that_it_can(quantization: Any, device: Any) -> None:
    args = ServerArgs(quantization=quantization, device=device, dtype="bfloat16", page_size=32)
    assert resolve(args, model()).runner.quantization == quantization


def test_float8_with_ranks_and_any_pages() -> None:
    args = ServerArgs(quantization="fp8", device="cuda", tp_size=2, page_size=1, attention_backend="torch")
    assert resolve(args, model(num_heads=4)).runner.quantization == "fp8"


def test_graphs_and_steps_ahead() -> None:
    def chosen(**args: object) -> tuple[int, int]:
        config = resolve(ServerArgs(**args), model())
        return config.runner.cuda_graph_max_bs, config.scheduler.steps_ahead

    assert chosen(device="cpu") == chosen(device="cpu", cuda_graph_max_bs=8) == (0, 0)
    assert chosen(device="cuda") == (256, 1)
    assert chosen(device="cuda", max_running_requests=20) == (20, 1)
    assert chosen(device="cuda", max_running_requests=1000) == (256, 1)
    assert chosen(device="cuda", cuda_graph_max_bs=8, disable_overlap_schedule=True) == (8, 0)
    assert chosen(device="cuda", disable_cuda_graph=True) == (0, 1)
    assert chosen(device="cuda", tp_size=2) == (256, 1)


@pytest.mark.parametrize(
    ("with_bfloat16", "own", "chosen"),
    [
        (True, "bfloat16", "bfloat16"),
        (True, "float16", "bfloat16"),
        (True, "float32", "float32"),
        (False, "bfloat16", "float32"),
    ],
    indirect=["with_bfloat16"],
)
@pytest.mark.usefixtures("with_bfloat16")
def test_the_dtype_on_a_cpu(own: str, chosen: str) -> None:
    assert resolve(ServerArgs(device="cpu"), model(dtype=own)).runner.dtype == chosen
    assert resolve(ServerArgs(device="cpu", dtype="float16"), model(dtype=own)).runner.dtype == "float16"


def test_a_model_that_embeds(caplog: pytest.LogCaptureFixture) -> None:
    embedding = EmbeddingInfo(reason="it is an encoder", max_tokens=256, lowercase=True, dimensions=(64, 32))
    with caplog.at_level(logging.INFO):
        config = resolve(ServerArgs(device="cpu"), model(embedding=embedding))
    assert "is_embedding: True, because it is an encoder (automatic)" in caplog.text
    assert config.frontend.is_embedding
    assert config.frontend.dimensions == (64, 32)
    assert config.tokenizer.lowercase
    assert config.runner.dtype == "float32"  # although its weights are bfloat16
    lengths = (config.frontend, config.tokenizer, config.scheduler, config.runner)
    assert {part.context_length for part in lengths} == {256}
    targets = {process.name: process.target for process in engine_processes(config, Addresses("/x", 1))}
    assert targets["scheduler-0"] == "ramet.scheduler.embedding_worker:run"
    # Positions that the model has, if it was not trained on them, only on request.
    longer = resolve(ServerArgs(device="cpu", context_length=2048, dtype="bfloat16"), model(embedding=embedding))
    assert (longer.tokenizer.context_length, longer.runner.dtype) == (2048, "bfloat16")


def test_a_model_that_generates_embeds_on_request() -> None:
    assert not resolve(ServerArgs(device="cpu"), model()).frontend.is_embedding
    config = resolve(ServerArgs(device="cpu", is_embedding=True), model())
    assert config.frontend.is_embedding
    assert (config.frontend.dimensions, config.runner.context_length, config.runner.dtype) == (None, 2048, "float32")


def test_what_the_user_gives_is_passed_on() -> None:
    args = ServerArgs(
        device="cpu",
        context_length=100,
        max_total_tokens=5000,
        chunked_prefill_size=128,
        served_model_name=("a", "b"),
        api_key=("k",),
        disable_radix_cache=True,
        stream_interval=3,
        tokenizer_worker_num=2,
        chat_template="{{ messages }}",
    )
    config = resolve(args, model())
    assert (config.runner.max_total_tokens, config.runner.context_length) == (5000, 100)
    assert (config.scheduler.max_step_tokens, config.scheduler.max_prefill_tokens) == (128, 128)
    assert (config.frontend.served_names, config.frontend.api_keys) == (("a", "b"), ("k",))
    assert not config.scheduler.prefix_cache
    assert config.detokenizer.stream_interval == 3
    assert config.tokenizer.chat_template == "{{ messages }}"
    names = [process.name for process in engine_processes(config, Addresses("/x", 2))]
    assert sorted(names) == ["detokenizer", "frontend", "scheduler-0", "tokenizer-0", "tokenizer-1"]


@pytest.mark.parametrize(
    ("args", "facts", "words"),
    [
        (ServerArgs(context_length=4096), {}, "context_length 4096 is above the 2048 tokens"),
        (ServerArgs(), {"context_length": None}, "give --context-length"),
        (ServerArgs(is_embedding=True, max_total_tokens=9), {}, "max_total_tokens is not for servers that embed"),
        (ServerArgs(max_running_requests=600, chunked_prefill_size=512), {}, r"\(600\) is above .* \(512\)"),
        (ServerArgs(chat_template="/nowhere.jinja"), {}, "chat_template '/nowhere.jinja' is neither"),
    ],
)
def test_contradictions_are_refused(args: ServerArgs, facts: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(msgspec.structs.replace(args, device="cpu"), model(**facts))


def test_a_chat_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ x }}")
    assert resolve(ServerArgs(chat_template=str(path)), model()).tokenizer.chat_template == "{{ x }}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 x\n", True),
        ("flags : fpu amx_bf16\n", True),
        ("Features : fp bf16\n", True),
        ("flags : fpu avx2 not_avx512_bf16\n", False),
        ("", False),
    ],
)
def test_bfloat16_of_the_cpu(tmp_path: Path, text: str, expected: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert cpu_has_bfloat16(path) is expected
    assert not cpu_has_bfloat16(tmp_path / "none")


def test_only_the_scheduler_gets_many_threads() -> None:
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    assert computing(None, None, {}).env["OMP_NUM_THREADS"] == str(len(allowed))
    assert computing(allowed[:1], None, {}).env["OMP_NUM_THREADS"] == "1"
    assert computing(None, None, {"OMP_NUM_THREADS": "3"}).env["OMP_NUM_THREADS"] == "3"
    assert computing(None, 5, {"OMP_NUM_THREADS": "3"}).env["OMP_NUM_THREADS"] == "5"
    assert light().env["OMP_NUM_THREADS"] == "1"
    assert light().nice > computing(None, None, {}).nice


def test_waiting_policy_of_the_user_is_kept() -> None:
    ours = int(computing(None, None, {}).env["GOMP_SPINCOUNT"])
    assert 0 < ours < 20_000
    assert computing(None, None, {"GOMP_SPINCOUNT": "7"}).env["GOMP_SPINCOUNT"] == "7"
    assert "GOMP_SPINCOUNT" not in computing(None, None, {"OMP_WAIT_POLICY": "active"}).env


def test_lists_of_cpus() -> None:
    first = min(os.sched_getaffinity(0))
    assert parse_cpus(f"{first}") == parse_cpus(f"{first}-{first}, {first}") == (first,)
    for wrong in (f"{first}-99999999999", f"{first},5-4"):  # the first as a set would fill the memory
        with pytest.raises(ValueError, match="names CPUs outside"):
            parse_cpus(wrong)
