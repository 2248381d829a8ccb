"""Hostile bodies, made from the server's own `/openapi.json`: whatever comes is answered as documented, and the server
lives on. No request asks for more than a few tokens."""

import collections
import json
import socket
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.server import RunningServer

pytestmark = pytest.mark.e2e

JSON = {"content-type": "application/json"}
# What would make a right body expensive, and the most of it that is sent.
COSTLY = {"max_tokens": 3, "max_completion_tokens": 3, "max_new_tokens": 3, "n": 2, "best_of": 2}
# Values that are right for a field more often than what its schema alone would give.
LIKELY: dict[str, list[Any]] = {
    "messages": [[{"role": "user", "content": "hi"}]],
    "prompt": ["a", [5, 6], ["a", "b"]],
    "text": ["a", ["a", "b"]],
    "input_ids": [[5], [[5], [6, 7]]],
    "tokens": [[5, 6], []],
    "temperature": [0, 0.7],
    "logit_bias": [{"5": 1}, {"5": -100}],
    "tool_choice": ["none"],
    "response_format": [{"type": "text"}, {"type": "json_object"}],
    "json_schema": [{"type": "integer"}, "{}"],
    "regex": ["a+"],
    "ebnf": ['root ::= "a"'],
}
LEAVES = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63 - 1, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320),
    *("", "a", "\x00", "é", "🦊\u202e", "\ud800", "x" * 3000, "{{ 1/0 }}", "<|im_end|>", "NaN", "1", "user", "text"),
]
NAMES = ["role", "content", "type", "text", "include_usage", "5", "-1", "", "function", "name", "n", "stop"]
JUNK = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)


class Api:
    """The described server: its POST endpoints with JSON bodies, and strategies for those."""

    def __init__(self, document: dict[str, Any], model: str) -> None:
        self._schemas = document["components"]["schemas"]
        self._model = model
        self.error = self._schemas["Error"]
        self.operations = {
            path: item["post"]
            for path, item in document["paths"].items()
            if "application/json" in item.get("post", {}).get("requestBody", {}).get("content", {})
        }

    def fields(self) -> dict[str, dict[str, Any]]:
        """The properties of each body, by path."""
        bodies = {path: item["requestBody"]["content"]["application/json"] for path, item in self.operations.items()}
        return {path: self._resolve(body["schema"])["properties"] for path, body in bodies.items()}

    def _resolve(self, schema: dict[str, Any]) -> Any:
        return self._schemas[schema["$ref"].rpartition("/")[2]]

    def body(self, path: str) -> st.SearchStrategy[Any]:
        schema = self.operations[path]["requestBody"]["content"]["application/json"]["schema"]
        properties = self._resolve(schema)["properties"]
        return self._values(schema).map(lambda body: self._complete(body, properties))

    def _complete(self, body: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
        """With a model that is served, and one of two fields that exclude each other."""
        if "model" in body:
            body["model"] = self._model
        for one, other in (("text", "input_ids"), ("prompt", "messages")):
            if {one, other} <= set(properties):
                body.setdefault(other if other in body else one, "a")
                if other in body:
                    body.pop(one, None)
        return cheap(body, properties)

    def _values(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        if "$ref" in schema:
            return st.deferred(lambda: self._values(self._resolve(schema)))
        if "anyOf" in schema:
            return st.one_of([self._values(option) for option in schema["anyOf"]])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        match schema.get("type"):
            case "object" if "properties" in schema:
                return self._struct(schema)
            case "object":
                return st.dictionaries(st.sampled_from(NAMES), self._values(_rest(schema)), max_size=2)
            case "array":
                return st.lists(self._values(schema.get("items", {})), max_size=2)
            case "string":
                return st.sampled_from(["a", "", "é🦊", "\x00", "<|im_end|>", "[" * 50]) | st.text(max_size=4)
            case "integer":
                return st.sampled_from([0, 1, 2, 3, 5, -1, 2**62])
            case "number":
                return st.sampled_from([0, 1, 0.5, 1.5, -1, 1e300])
            case "boolean":
                return st.booleans()
            case "null":
                return st.none()
        return JUNK

    def _struct(self, schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
        def field(name: str) -> st.SearchStrategy[Any]:
            right = self._values(schema["properties"][name])
            return (
                st.sampled_from([*LIKELY[name], None]).flatmap(
                    lambda likely: right if likely is None else st.just(likely)
                )
                if name in LIKELY
                else right
            )

        required = schema.get("required", [])
        usual = [name for name in schema["properties"] if name in ("model", "prompt", "text")]
        optional = [name for name in schema["properties"] if name not in required]
        if not optional:
            return st.fixed_dictionaries({name: field(name) for name in required})
        some = st.lists(st.sampled_from(optional), max_size=3, unique=True) | st.just(usual)
        return some.flatmap(lambda names: st.fixed_dictionaries({name: field(name) for name in [*required, *names]}))


def cheap(body: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
    """The same with few tokens, unless it is wrong in that."""
    if "max_tokens" in properties:
        body.setdefault("max_tokens", 3)
    if "sampling_params" in properties:
        for part in _structs(body.setdefault("sampling_params", {})):
            part.setdefault("max_new_tokens", 3)
    for part in [body, *_structs(body.get("sampling_params"))]:
        for name, most in COSTLY.items():
            if name in part and (part[name] is None or (isinstance(part[name], int) and most < part[name] < 2**31)):
                part[name] = most
    return body


def _structs(value: Any) -> list[dict[str, Any]]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, dict)]


def _rest(schema: dict[str, Any]) -> dict[str, Any]:
    rest = schema.get("additionalProperties", {})
    return rest if isinstance(rest, dict) else {}


def _flip(content: bytes) -> st.SearchStrategy[bytes]:
    """Cut off, with bytes replaced, with text put in."""
    at = st.integers(0, max(len(content) - 1, 0))
    noise = st.sampled_from(
        [b"\xff", b"\x00", b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b"[" * 2000, b"{", b"'", b"9" * 5000]
    )
    return st.one_of(
        at.map(lambda i: content[:i]),
        st.tuples(at, noise).map(lambda cut: content[: cut[0]] + cut[1] + content[cut[0] + 1 :]),
        # The same key twice.
        st.just(content[:-1] + b"," + content[1:]),
        st.binary(max_size=20),
    )


@pytest.fixture
def api(tiny: RunningServer) -> Api:
    return Api(httpx.get(f"{tiny.url}/openapi.json").json(), tiny.model)


@pytest.fixture(autouse=True)
def _answers_right_after(tiny: RunningServer) -> Any:
    yield
    answer = tiny.client.completions.create(model=tiny.model, prompt="a", max_tokens=1)
    assert answer.usage and answer.usage.completion_tokens == 1


def check(api: Api, path: str, response: httpx.Response) -> None:
    """The answer is one of those documented, and not the server's fault."""
    assert response.status_code < 500, response.text
    assert str(response.status_code) in api.operations[path]["responses"], response.status_code
    kind = response.headers["content-type"]
    if response.status_code != 200:
        assert kind == "application/json"
        jsonschema.validate(response.json(), api.error)
        assert response.json()["error"]["message"]
        assert len(response.content) < 5000
    elif kind.startswith("text/event-stream"):
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert not any("error" in json.loads(event.removeprefix("data: ")) for event in events[:-2])
    else:
        assert response.json() is not None


def test_generated_bodies(tiny: RunningServer, http: httpx.Client, api: Api) -> None:
    """From the schemas: as they are, with a value of the wrong kind, with broken bytes."""
    assert {"/v1/chat/completions", "/v1/completions", "/generate", "/tokenize", "/detokenize"} <= set(api.operations)
    statuses = collections.Counter[tuple[str, int]]()

    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def send(path: str, data: st.DataObject) -> None:
        body = data.draw(api.body(path))
        kind = data.draw(st.sampled_from(["right", "right", "wrong value", "broken"]))
        if kind == "wrong value":
            body[data.draw(st.sampled_from([*body, "zap"]))] = data.draw(JUNK)
            body = cheap(body, api.fields()[path])
        content = json.dumps(body).encode()
        if kind == "broken":
            content = data.draw(_flip(content))
        response = http.post(path, content=content, headers=JSON)
        check(api, path, response)
        statuses[path, response.status_code] += 1

    for path in sorted(api.operations):  # one by one: the generator would choose a few of them nearly always
        send(path)
    print(statuses)
    for path in ("/v1/chat/completions", "/v1/completions", "/generate", "/tokenize", "/detokenize"):
        assert statuses[path, 200] >= 3  # else it fuzzed nothing
        assert statuses[path, 400] >= 3


FREE = {
    "/v1/chat/completions": ["chat_template_kwargs", "tools", "metadata"],
    "/tokenize": ["chat_template_kwargs", "tools"],
}


@pytest.mark.parametrize(("path", "field"), [(path, field) for path, fields in FREE.items() for field in fields])
def test_depth(tiny: RunningServer, http: httpx.Client, api: Api, path: str, field: str) -> None:
    """JSON of any depth in a field of any shape, past what each of the processes can follow."""
    known = {"model": tiny.model, "messages": [{"role": "user", "content": "hi"}]}
    if path != "/tokenize":
        known |= {"max_tokens": 1, "tool_choice": "none"}
    start = json.dumps(known)[:-1].encode()
    for depth in [10, 200, 500, *range(800, 1010, 6), 5000, 100_000]:
        value = b'{"a":' * depth + b"1" + b"}" * depth
        value = b"[" + value + b"]" if field == "tools" else value
        response = http.post(path, content=start + b', "%b": %b}' % (field.encode(), value), headers=JSON)
        check(api, path, response)


def test_arguments_of_any_depth(tiny: RunningServer, http: httpx.Client, api: Api) -> None:
    """JSON in a string in JSON: decoded for the template."""
    path = "/v1/chat/completions"
    for depth in (100, *range(800, 1010, 15), 50_000):
        arguments = '{"a":' * depth + "1" + "}" * depth
        call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
        body = {"model": tiny.model, "max_tokens": 1, "messages": messages}
        check(api, path, http.post(path, json=body))


def test_long_strings(tiny: RunningServer, http: httpx.Client, api: Api) -> None:
    """10 MB in every field that may hold a string; no error repeats them, and none takes a minute."""
    long = "x y" * 3_500_000
    for path, properties in api.fields().items():
        needed = {"model": tiny.model, "prompt": "a", "text": "a", "tokens": [5], "max_tokens": 1}
        if "max_completion_tokens" in properties:
            needed["messages"] = [{"role": "user", "content": "a"}]
        body = {name: value for name, value in needed.items() if name in properties}
        for field, schema in properties.items():
            if {"type": "string"} in [schema, *schema.get("anyOf", ())]:
                check(api, path, http.post(path, json={**body, field: long}))


HEADERS: list[dict[str, Any]] = [
    {"content-type": "text/plain"},
    {"content-type": ""},
    {"content-type": "application/json; charset=utf-16"},
    {"content-type": b"\xff\xfe"},
    {**JSON, "content-encoding": "gzip"},
    {**JSON, "authorization": b"Bearer \xff\xff"},
    {**JSON, "x-request-id": b"\xe9\xff" * 100},
    {**JSON, "x-request-id": "a" * 5000},
    {**JSON, "cookie": "x" * 20_000},
    {**JSON, "accept": "image/png", "range": "bytes=5-1", "expect": "nothing"},
]


@pytest.mark.parametrize("headers", HEADERS, ids=range(len(HEADERS)))
def test_headers(tiny: RunningServer, http: httpx.Client, api: Api, headers: dict[str, Any]) -> None:
    for path in api.operations:
        response = http.post(path, content=b'{"prompt": "a"}', headers=headers)
        check(api, path, response)
        assert response.headers["x-request-id"].isascii()


RAW = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # TLS
    b"GET\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999999\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 5\r\n\r\n{",
    b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"POST /tokenize HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{\r\n",
    b"GET /v1/models/%ff%fe%00../../etc HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


@pytest.mark.parametrize("data", RAW, ids=range(len(RAW)))
def test_bytes_that_are_hardly_http(tiny: RunningServer, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=5) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except (ConnectionResetError, TimeoutError):
            pass
    assert not answer.startswith(b"HTTP/1.1 5"), answer
