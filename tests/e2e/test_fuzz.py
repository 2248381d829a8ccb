"""Random bodies: whatever comes, the answer is JSON, no bug shows, and the server lives on."""

import json
import random
from typing import Any

import httpx
import pytest
from support.server import RunningServer

pytestmark = pytest.mark.e2e

ROUTES = ("/v1/chat/completions", "/v1/completions")
NUM_BODIES = 60
# fmt: off
FIELDS = (
    "prompt", "messages", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "temperature",
    "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "logprobs", "top_logprobs", "echo", "best_of", "suffix", "user", "min_tokens", "ignore_eos",
    "stop_token_ids", "skip_special_tokens", "priority", "rid", "tools", "tool_choice", "response_format", "metadata",
    "store", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "service_tier", "nonsense",
)
# fmt: on


def junk(random: random.Random, depth: int = 0) -> Any:
    """Any JSON value, at times close to one that is right."""
    leaves = [
        *(None, True, False, 0, 1, -1, 3, 2**31, 2**63 - 1, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320),
        *(
            "",
            "a",
            "\x00",
            "é",
            "🦊\u202e",
            "\ud800",
            "x" * 3000,
            "{{ 1/0 }}",
            "<|im_end|>",
            "NaN",
            "1",
            "user",
            "text",
        ),
    ]
    if depth > 3 or random.random() < 0.6:
        return random.choice(leaves)
    if random.random() < 0.5:
        return [junk(random, depth + 1) for _ in range(random.randrange(4))]
    names = ("role", "content", "type", "text", "include_usage", "5", "-1", "", "function", "name")
    return {random.choice(names): junk(random, depth + 1) for _ in range(random.randrange(4))}


def body(random: random.Random, model: str) -> dict[str, Any]:
    """A right body with a few fields replaced: of nothing but junk, all would fail at the first field."""
    value: dict[str, Any] = {"model": model, "max_tokens": 3}
    value |= {"prompt": "a"} if random.random() < 0.5 else {"messages": [{"role": "user", "content": "hi"}]}
    for name in random.sample(FIELDS, random.randrange(1, 4)):
        value[name] = junk(random)
    if random.random() < 0.1:
        value["model"] = junk(random)
    return value


def check_answer(response: httpx.Response) -> None:
    kind = response.headers["content-type"]
    if response.status_code == 200 and kind.startswith("text/event-stream"):
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all("error" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])
        return
    assert kind == "application/json"
    if response.status_code == 200:
        assert response.json()["choices"]
    else:
        assert response.status_code in (400, 404), response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["code"]


def test_random_bodies(tiny: RunningServer, http: httpx.Client) -> None:
    generator = random.Random(20)
    statuses = set()
    for _ in range(NUM_BODIES):
        content = json.dumps(body(generator, tiny.model)).encode()
        for route in ROUTES:
            response = http.post(route, content=content, headers={"content-type": "application/json"})
            try:
                check_answer(response)
            except Exception as error:
                raise AssertionError(f"{route} {content!r}: {response.status_code} {response.text[:500]}") from error
            statuses.add(response.status_code)
    assert {200, 400} <= statuses  # else it fuzzed nothing
    assert http.get("/health").status_code == 200
