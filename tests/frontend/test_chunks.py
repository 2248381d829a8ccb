"""Most chunks of a stream are made from a template. They are, byte for byte, what is encoded as a whole."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.frontend.api.chat import ChatChoice
from ramet.frontend.api.chunks import OpenAIAnswer
from ramet.frontend.api.completions import CompletionAnswer
from ramet.frontend.generation import ChoiceRecord, Generation
from ramet.frontend.schemas.chat import ChatRequest
from ramet.frontend.schemas.completions import CompletionRequest
from ramet.ipc.messages import PromptInfo, TextDelta

OPTIONS = [None, {"include_usage": True}, {"continuous_usage_stats": True}]


def generation(n: int) -> Generation:
    made = Generation(["r-0", "r-1"], n, False, lambda rids: None, lambda: None)
    made.records = [ChoiceRecord(0.0, prompt_tokens=2, cached_tokens=1, tokens=3) for _ in range(2)]
    return made


def both(answer: OpenAIAnswer, index: int, text: str) -> tuple[bytes, bytes]:
    """The chunk with a text as the first event of a choice and as a later one."""
    first = answer.render(index, TextDelta("r", text, 3, PromptInfo(2, 1)))
    later = answer.render(index, TextDelta("r", text, 3))
    return first.removesuffix(b"\n\n").split(b"\n\n")[-1] + b"\n\n", later


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(text=st.text(min_size=1), rid=st.sampled_from([":", '""', None]))
def test_chat(options: dict[str, Any] | None, text: str, rid: str | None) -> None:
    body = {"model": '""', "messages": [], "n": 2, "stream": True, "stream_options": options, "rid": rid}
    request = msgspec.convert(body, ChatRequest)
    choices = [ChatChoice(index, False, None, "json", None, calls_lead=False) for index in range(2)]
    answer = OpenAIAnswer("chatcmpl", "kind", "chunk", request, generation(2), choices)
    for index in range(2):
        whole, made = both(answer, index, text)
        assert made == whole
        assert msgspec.json.decode(made[6:])["choices"][0]["delta"] == {"content": text}
    assert answer.render(0, TextDelta("r", "", 4)) == b""


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(text=st.text(min_size=1))
def test_completions(options: dict[str, Any] | None, text: str) -> None:
    body = {"model": "m", "prompt": ["a", "b"], "stream": True, "stream_options": options}
    request = msgspec.convert(body, CompletionRequest)
    answer = CompletionAnswer(request, ["a", "b"], generation(1))
    for index in range(2):
        whole, made = both(answer, index, text)
        assert made == whole
        assert msgspec.json.decode(made[6:])["choices"][0]["text"] == text
    assert answer.render(0, TextDelta("r", "", 4)) == b""
