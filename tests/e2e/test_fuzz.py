"""Random bodies: whatever comes, the answer is JSON, no bug shows, and the server lives on."""

import collections
import json
import random
from typing import Any

import httpx
import pytest
from support.server import RunningServer

pytestmark = pytest.mark.e2e

ROUTES = ("/v1/chat/completions", "/v1/completions")
NUM_BODIES = 60
# Names, and values that are right for most of them: of nothing but junk, hardly a body would get past the schema.
FIELDS = (
    ("n top_k min_tokens max_tokens seed priority top_logprobs best_of logprobs", (0, 1, 2, 3, -1)),
    ("temperature top_p min_p presence_penalty frequency_penalty repetition_penalty", (0, 1, 0.5, 1.5, -0.5)),
    ("stream ignore_eos skip_special_tokens echo logprobs store add_generation_prompt", (True, False)),
    ("stop rid user suffix service_tier continue_final_message", ("a", "<|im_end|>", "\x00", "é")),
    ("stop_token_ids logit_bias tools tool_choice", ([], [5], {"5": 1}, {"5": -100}, "none")),
    ("stream_options metadata response_format chat_template_kwargs", ({"include_usage": True}, {"type": "text"}, {})),
    ("prompt messages max_completion_tokens nonsense", ("a", [5], ["a", "b"], [{"role": "user", "content": "a"}], 2)),
)


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


def body(random: random.Random, model: str, route: str) -> dict[str, Any]:
    """A right body with a few fields replaced."""
    value: dict[str, Any] = {"model": model, "max_tokens": 3}
    value |= {"prompt": "a"} if route == ROUTES[1] else {"messages": [{"role": "user", "content": "hi"}]}
    for names, likely in random.sample(FIELDS, random.randrange(1, 4)):
        value[random.choice(names.split())] = random.choice(likely) if random.random() < 0.8 else junk(random)
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
    statuses = collections.Counter[int]()
    for number in range(2 * NUM_BODIES):
        route = ROUTES[number % 2]
        content = json.dumps(body(generator, tiny.model, route)).encode()
        response = http.post(route, content=content, headers={"content-type": "application/json"})
        try:
            check_answer(response)
        except Exception as error:
            raise AssertionError(f"{route} {content!r}: {response.status_code} {response.text[:500]}") from error
        statuses[response.status_code] += 1
    print(statuses)
    assert min(statuses[200], statuses[400]) >= NUM_BODIES / 4  # else it fuzzed nothing
    assert http.get("/health").status_code == 200
