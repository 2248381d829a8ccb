"""`/openapi.json` is a valid OpenAPI 3.1 document that names every route, body and error of the server."""

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import openapi_spec_validator
import pytest
from support.scripted_engine import ScriptedEngine

# What every server has; others may add to it.
PATHS = {
    "/v1/chat/completions": "post",
    "/v1/completions": "post",
    "/v1/models": "get",
    "/v1/models/{model}": "get",
    "/v1/files": "post",
    "/v1/files/{file_id}": "delete",
    "/v1/files/{file_id}/content": "get",
    "/v1/batches": "get",
    "/v1/batches/{batch_id}": "get",
    "/v1/batches/{batch_id}/cancel": "post",
    "/generate": "post",
    "/tokenize": "post",
    "/detokenize": "post",
    "/v1/tokenize": "post",
    "/v1/detokenize": "post",
    "/get_model_info": "get",
    "/get_server_info": "get",
    "/tokenizer_info": "get",
    "/version": "get",
    "/flush_cache": "post",
    "/abort_request": "post",
    "/health": "get",
    "/health_generate": "get",
    "/ready": "get",
    "/metrics": "get",
    "/openapi.json": "get",
}


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(api_keys=("s3cret",)) as engine:
        yield engine


@pytest.fixture(scope="module")
def document(engine: ScriptedEngine) -> Any:
    return httpx.get(f"{engine.url}/openapi.json").raise_for_status().json()  # without a key


def test_it_is_valid(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    openapi_spec_validator.validate(document)
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_route_is_there(document: Any) -> None:
    assert {path: method for path, method in PATHS.items() if method not in document["paths"].get(path, {})} == {}
    operations = [item for path in document["paths"].values() for item in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert all(operation["summary"] for operation in operations)


def test_the_routes_are_those_of_the_server(engine: ScriptedEngine, document: Any) -> None:
    """What the document says of methods and keys is what the server does."""
    for path, item in document["paths"].items():
        url = engine.url + path.replace("{", "x").replace("}", "x")
        response = httpx.request("PATCH", url, headers={"authorization": "Bearer s3cret"})
        assert response.status_code == 405, path
        assert set(response.headers["allow"].lower().split(", ")) - {"head"} == set(item)
        for method, operation in item.items():
            keyed = httpx.request(method, url).status_code == 401
            assert keyed == bool(operation.get("security")) == ("401" in operation["responses"]), path


def test_what_may_not_be_there_or_has_ended(document: Any) -> None:
    """By file and by batch; a fuzzer takes an answer that is not described for a fault."""
    paths = document["paths"]
    assert "404" in paths["/v1/batches"]["post"]["responses"]
    assert {"404", "409"} <= paths["/v1/batches/{batch_id}/cancel"]["post"]["responses"].keys()
    assert "409" not in paths["/v1/files/{file_id}"]["get"]["responses"]
    assert "504" in paths["/v1/chat/completions"]["post"]["responses"]


def test_queries(document: Any) -> None:
    """Whatever else is asked of an endpoint is refused, but of the open ones."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            named = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"]
            lists = {"/v1/files": ["purpose", "limit", "order", "after"], "/v1/batches": ["limit", "after"]}
            assert named == (lists.get(path, []) if method == "get" else []), path
            assert ("400" in operation["responses"]) == ("security" in operation), path
    limit = document["paths"]["/v1/batches"]["get"]["parameters"][0]["schema"]
    assert (limit["type"], limit["maximum"], limit["default"]) == ("integer", 100, 20)


def test_each_array_says_what_it_holds(document: Any) -> None:
    """Generators of clients cannot do without."""
    rest: list[Any] = [document["components"]["schemas"]]
    while rest:
        part = rest.pop()
        if isinstance(part, dict):
            assert part.get("type") != "array" or part.keys() & {"items", "prefixItems"}, part
            rest += part.values()
        elif isinstance(part, list):
            rest += part


def test_bodies(document: Any) -> None:
    schema = document["components"]["schemas"]["ChatRequest"]
    assert set(schema["required"]) == {"model", "messages"}
    assert schema["additionalProperties"] is False
    validator = jsonschema.Draft202012Validator({"$ref": "#/components/schemas/ChatRequest", **document})
    good = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": None, "stop": ["a"]}
    assert validator.is_valid(good)
    assert not validator.is_valid({**good, "temperature": "warm"})
    assert not validator.is_valid({**good, "nonsense": 1})
    native = document["components"]["schemas"]["NativeSampling"]["properties"]
    assert "max_new_tokens" in native
    assert "max_tokens" not in native


def test_answers(engine: ScriptedEngine, document: Any) -> None:
    """What a struct describes is described, and so."""
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="s3cret") as client:
        file = client.files.create(file=b"x", purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    for kind, path, answer in (("File", "/v1/files/{file_id}", file), ("Batch", "/v1/batches/{batch_id}", batch)):
        content = document["paths"][path]["get"]["responses"]["200"]["content"]
        assert content == {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind}"}}}
        validator = jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{kind}", **document})
        validator.validate(answer.model_dump(mode="json", exclude_unset=True))
        assert not validator.is_valid({"id": 1})


def test_errors(engine: ScriptedEngine, document: Any) -> None:
    """The error that a server sends is the one it describes."""
    schema = document["components"]["schemas"]["Error"]
    headers = {"authorization": "Bearer s3cret", "content-type": "application/json"}
    posts = {path: item["post"] for path, item in document["paths"].items() if "post" in item}
    for path, operation in posts.items():
        if "application/json" not in operation.get("requestBody", {}).get("content", {}):
            continue
        assert {"400", "401", "413", "415", "429", "500", "503"} <= set(operation["responses"])
        response = httpx.post(engine.url + path, content=b"{", headers=headers)
        assert response.status_code == 400
        jsonschema.validate(response.json(), schema)


def test_without_keys_there_is_no_security() -> None:
    with ScriptedEngine() as engine:
        document = httpx.get(f"{engine.url}/openapi.json").json()
    openapi_spec_validator.validate(document)
    assert "securitySchemes" not in document["components"]
    assert not any("security" in operation for item in document["paths"].values() for operation in item.values())
