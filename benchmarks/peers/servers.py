"""Starts one of the compared servers with its best flags, tells when it is ready and what memory it holds, stops it.

`CONFIGURATIONS` lists them all by name. Each has the machine to itself: one runs at a time.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from benchmarks.peers.install import llama_server, vllm_python
from benchmarks.peers.models import Model

PORT = 30990
URL = f"http://127.0.0.1:{PORT}"
_START_TIMEOUT_S = 400


@dataclasses.dataclass(frozen=True)
class Configuration:
    """`engine` is the row of the table: several configurations of one engine compete, and the best counts.

    `workloads`: those that it is here for; without any, all."""

    engine: str
    weights: str  # "folder", "gguf", or "quantized": the file with fewer bits
    flags: tuple[str, ...]
    bench_flags: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()

    def command(self, work: Path, model: Model) -> tuple[list[str], dict[str, str]]:
        path = str({"folder": model.folder, "gguf": model.gguf, "quantized": model.quantized}[self.weights])
        where = ["--host", "127.0.0.1", "--port", str(PORT)]
        if self.engine.startswith("Ramet"):
            return [sys.executable, "-m", "ramet.launch_server", "--model-path", path, *where, *self.flags], {}
        if self.engine.startswith("llama.cpp"):
            return [str(llama_server(work)), "-m", path, *where, *self.flags], {}
        binding = {"VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_CPU_KVCACHE_SPACE": "4"}
        return [str(vllm_python(work).with_name("vllm")), "serve", path, *where, *self.flags], binding


_LLAMA = ("-t", "2", "-tb", "2", "-np", "32")
# It closes a kept connection after a streamed answer.
_ANEW = ("--no-keep-alive",)
_VLLM = ("--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "32")
CONFIGURATIONS = {
    "ramet": Configuration("Ramet", "folder", ()),
    "ramet-int8": Configuration("Ramet int8", "folder", ("--quantization", "int8")),
    "ramet-int4": Configuration("Ramet int4, the Q4_1 file", "quantized", ("--quantization", "int4")),
    "llama-batch": Configuration("llama.cpp", "gguf", (*_LLAMA, "--kv-unified", "-c", "32768"), _ANEW),
    "llama-single": Configuration(
        "llama.cpp", "gguf", (*_LLAMA, "--no-kv-unified", "-c", "73728"), _ANEW, ("W1", "W4")
    ),
    "llama-q4": Configuration(
        "llama.cpp, the Q4_1 file", "quantized", (*_LLAMA, "--no-kv-unified", "-c", "73728"), _ANEW, ("W1",)
    ),
    "vllm": Configuration("vLLM CPU", "folder", _VLLM),
}


class Server:
    """A running server; leaving the `with` block stops it. Its output is in `log`."""

    def __init__(self, configuration: Configuration, work: Path, model: Model, log: Path) -> None:
        command, env = configuration.command(work, model)
        started = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, env={**os.environ, **env}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        while not self._is_ready():
            if self._process.poll() is not None or time.perf_counter() - started > _START_TIMEOUT_S:
                self.stop()
                raise SystemExit(f"the server did not become ready: {' '.join(command)}; see {log}")
            time.sleep(0.05)
        self.ready_s = time.perf_counter() - started

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def memory_mib(self) -> float:
        """Of all its processes, memory they share counted once."""
        root = psutil.Process(self._process.pid)
        return sum(process.memory_full_info().pss for process in [root, *root.children(recursive=True)]) / 2**20

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session
            self._process.wait()

    @staticmethod
    def _is_ready() -> bool:
        try:
            with urllib.request.urlopen(f"{URL}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False  # not yet
