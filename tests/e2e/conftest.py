"""Servers that tests share: started when first asked for, one at a time in each worker, for they share the cores."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from support.server import MINILM, SMOLLM2, RunningServer, tiny_flags
from support.tiny_embedders import make_tiny_embedder

# In the style of Hermes, for a model that is made to think before it answers.
THINKER = """{% for tool in tools or [] %}{{ tool | tojson }} in <tool_call></tool_call>
{% endfor %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking is not defined or enable_thinking %}<think>
{% endif %}"""


class Servers:
    """Keeps the server that was asked for last."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[str, ...], RunningServer] | None = None

    def get(self, *flags: str) -> RunningServer:
        if self._kept is None or self._kept[0] != flags:
            self.close()
            self._kept = (flags, RunningServer(*flags).__enter__())
        return self._kept[1]

    def close(self) -> None:
        """Stop it. What its tests have left running shows at the latest here."""
        kept, self._kept = self._kept, None
        if kept is not None:
            try:
                kept[1].quiet_metrics()
            finally:
                kept[1].__exit__(None, None, None)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture
def tiny(servers: Servers, tiny_model: Callable[[str], Path]) -> Iterator[RunningServer]:
    """A server with a tiny Llama of random weights, in float32."""
    yield from _watched(servers, tiny_flags(tiny_model("llama")))


@pytest.fixture
def smollm2(servers: Servers, smollm2_gguf: Path) -> Iterator[RunningServer]:
    """A server with SmolLM2-135M-Instruct and nothing else said."""
    yield from _watched(servers, SMOLLM2)


@pytest.fixture
def minilm_server(servers: Servers, minilm: Path) -> Iterator[RunningServer]:
    """A server with all-MiniLM-L6-v2 and nothing else said."""
    yield from _watched(servers, MINILM)


@pytest.fixture
def tiny_embedder(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that embeds with the body of a tiny Qwen3, a Matryoshka model."""
    folder = tmp_path_factory.getbasetemp() / "tiny-embedder"
    if not folder.exists():
        make_tiny_embedder("qwen3", folder, matryoshka_dimensions=[16, 32])
    yield from _watched(servers, ("--model-path", str(folder), "--is-embedding"))


@pytest.fixture
def thinker(servers: Servers, tiny_model: Callable[[str], Path]) -> Iterator[RunningServer]:
    """The tiny server with a template that knows tools and opens a block of reasoning."""
    yield from _watched(servers, (*tiny_flags(tiny_model("llama")), "--chat-template", THINKER))


@pytest.fixture
def client(tiny: RunningServer) -> openai.OpenAI:
    return tiny.client


@pytest.fixture
def http(tiny: RunningServer) -> httpx.Client:
    return tiny.http


def _watched(servers: Servers, flags: tuple[str, ...]) -> Iterator[RunningServer]:
    """Each test leaves the server it was lent in peace: idle, ready, and without a traceback in its log."""
    server = servers.get(*flags)
    seen = len(server.log())
    yield server
    news = server.log()[seen:]
    print(news)  # pytest shows it with a failure
    try:
        assert server.is_ready()
        server.wait_until_idle()
        assert "Traceback" not in news
    except BaseException:
        servers.close()
        raise
