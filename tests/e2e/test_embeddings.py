"""Embeddings from real engines: all-MiniLM-L6-v2 as a user has it, a tiny decoder, and a server that generates."""

import asyncio
import base64
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import transformers
from support.batches import checked_results, create, wait
from support.server import PATIENCE_S, RunningServer, until

pytestmark = pytest.mark.e2e

EMBEDDINGS, SCORE, RERANK = "/v1/embeddings", "/v1/score", "/v1/rerank"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
EXAMPLE = Path(__file__).parents[2] / "examples" / "embeddings.py"
TEXTS = ["Hi", "Ein Mann isst Brot. 一個男人 🍞", "word " * 250, "Paris is the capital of France."]


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def embed(server: RunningServer, **body: Any) -> list[np.ndarray]:
    response = server.http.post(EMBEDDINGS, json={"model": server.model, **body})
    assert response.status_code == 200, response.text
    return [np.array(item["embedding"]) for item in response.json()["data"]]


@torch.inference_mode()
def reference(folder: Path, texts: list[str]) -> list[np.ndarray]:
    """Each by itself, so that there is no padding: the mean over its tokens, at length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    means = [model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0].mean(0) for text in texts]
    return [(mean / mean.norm()).double().numpy() for mean in means]


# ---- all-MiniLM-L6-v2 -------------------------------------------------------------------------------------------


@pytest.mark.minilm
def test_as_transformers_through_the_sdk(minilm_server: RunningServer, minilm: Path) -> None:
    """The SDK asks for base64 and decodes it."""
    answer = minilm_server.client.embeddings.create(model=minilm_server.model, input=TEXTS)
    assert (answer.object, answer.model) == ("list", minilm_server.model)
    assert [(item.index, item.object) for item in answer.data] == [(i, "embedding") for i in range(len(TEXTS))]
    for item, expected in zip(answer.data, reference(minilm, TEXTS), strict=True):
        assert float(np.array(item.embedding) @ expected) > 1 - 1e-6
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    tokens = sum(len(tokenizer(text).input_ids) for text in TEXTS)  # [CLS] and [SEP] count
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)


@pytest.mark.minilm
def test_the_forms_of_input_and_of_the_answer(minilm_server: RunningServer, minilm: Path) -> None:
    ids = transformers.AutoTokenizer.from_pretrained(minilm)("Hello there").input_ids
    [as_text] = embed(minilm_server, input="Hello there")
    for same in ("Hello there", ["Hello there"], ids, [ids]):
        assert np.array_equal(embed(minilm_server, input=same)[0], as_text)
    assert not np.array_equal(embed(minilm_server, input=ids[1:-1])[0], as_text)  # ids are taken as they are
    body = {"model": minilm_server.model, "input": "Hello there", "encoding_format": "base64", "user": "u"}
    encoded = minilm_server.http.post(EMBEDDINGS, json=body).json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(encoded), "<f4"), as_text.astype("<f4"))


@pytest.mark.minilm
def test_2048_inputs_come_back_in_order_and_the_same_as_alone(minilm_server: RunningServer) -> None:
    words = [f"{random.Random(i).choice(['cat', 'moon', 'tax'])} {i}" for i in range(2048)]
    vectors = embed(minilm_server, input=words)
    assert len(vectors) == 2048
    for i in (0, 1, 1000, 2047):
        assert np.array_equal(vectors[i], embed(minilm_server, input=words[i])[0])
    response = minilm_server.http.post(EMBEDDINGS, json={"model": minilm_server.model, "input": [*words, "one more"]})
    error = error_of(response)
    assert (error["param"], error["message"]) == ("input", "input must hold at most 2048 items, got 2049")


@pytest.mark.minilm
def test_an_input_longer_than_the_context_fails_the_request_and_no_other(minilm_server: RunningServer) -> None:
    before = minilm_server.quiet_metrics()["ramet_scheduler_failed_total"]
    response = minilm_server.http.post(
        EMBEDDINGS, json={"model": minilm_server.model, "input": ["short", "word " * 255, *["short"] * 50]}
    )
    error = error_of(response)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert error["message"] == "this model's maximum context length is 256 tokens; the input has 257 tokens"
    assert len(embed(minilm_server, input="word " * 254)) == 1
    assert minilm_server.quiet_metrics()["ramet_scheduler_failed_total"] == before


@pytest.mark.minilm
@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (EMBEDDINGS, {}, "input", "missing_required_parameter"),
        (EMBEDDINGS, {"input": ""}, "input", "invalid_value"),
        (EMBEDDINGS, {"input": []}, "input", "invalid_value"),
        (EMBEDDINGS, {"input": ["a", ""]}, "input", "invalid_value"),
        (EMBEDDINGS, {"input": [[1], []]}, "input", "invalid_value"),
        (EMBEDDINGS, {"input": ["a", 1]}, "input", "invalid_value"),
        (EMBEDDINGS, {"input": [30522]}, "input", "invalid_value"),
        (EMBEDDINGS, {"input": [[5], [-1]]}, "input", "invalid_value"),
        (EMBEDDINGS, {"input": {"text": "a"}}, "input", "invalid_type"),
        (EMBEDDINGS, {"input": "a", "encoding_format": "hex"}, "encoding_format", "invalid_type"),
        (EMBEDDINGS, {"input": "a", "dimensions": 100}, "dimensions", "invalid_value"),
        (EMBEDDINGS, {"input": "a", "truncate": True}, "truncate", "unknown_parameter"),
        (SCORE, {"text_1": "a", "text_2": []}, "text_2", "invalid_value"),
        (SCORE, {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1", "invalid_value"),
        (RERANK, {"query": "", "documents": ["a"]}, "query", "invalid_value"),
        (RERANK, {"query": "a", "documents": []}, "documents", "invalid_value"),
        (RERANK, {"query": "a", "documents": ["b"], "top_n": 0}, "top_n", "invalid_value"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}]}, None, "unsupported_endpoint"),
        (COMPLETIONS, {"prompt": "a", "stream": True}, None, "unsupported_endpoint"),
    ],
)
def test_what_is_refused(minilm_server: RunningServer, path: str, body: Any, param: str | None, code: str) -> None:
    error = error_of(minilm_server.http.post(path, json={"model": minilm_server.model, **body}))
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    if code == "unsupported_endpoint":
        assert "--is-embedding" in error["message"]
        assert path in error["message"]
    if param == "dimensions":
        assert "384" in error["message"]
        assert "100" in error["message"]


@pytest.mark.minilm
def test_an_unknown_model_and_the_known_one(minilm_server: RunningServer) -> None:
    response = minilm_server.http.post(EMBEDDINGS, json={"model": "gpt-99", "input": "a"})
    assert error_of(response, 404)["code"] == "model_not_found"
    assert minilm_server.http.get("/v1/models").json()["data"][0]["max_model_len"] == 256


@pytest.mark.minilm
def test_score_and_rerank(minilm_server: RunningServer) -> None:
    query = "What is the capital of France?"
    documents = ["Bananas are yellow.", "The capital of France is Paris.", "Berlin is a large city in Germany."]
    vectors = embed(minilm_server, input=[query, *documents])
    cosines = [float(vectors[0] @ vector) for vector in vectors[1:]]

    body = {"model": minilm_server.model, "text_1": query, "text_2": documents}
    answer = minilm_server.http.post(SCORE, json=body).json()
    assert [item["score"] for item in answer["data"]] == pytest.approx(cosines, abs=1e-6)
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    pairs = minilm_server.http.post(SCORE, json={**body, "text_1": documents}).json()
    assert [item["score"] for item in pairs["data"]] == pytest.approx([1, 1, 1])

    body = {"model": minilm_server.model, "query": query, "documents": documents}
    answer = minilm_server.http.post(RERANK, json=body).json()
    assert [item["index"] for item in answer["results"]] == [1, 2, 0]
    assert [item["relevance_score"] for item in answer["results"]] == pytest.approx(sorted(cosines)[::-1], abs=1e-6)
    assert answer["results"][0]["document"] == {"text": documents[1]}
    assert answer["usage"]["total_tokens"] > 20
    answer = minilm_server.http.post(RERANK, json={**body, "top_n": 1, "return_documents": False}).json()
    [result] = answer["results"]
    assert set(result) == {"index", "relevance_score"}
    short = minilm_server.http.post("/rerank", json=body).json()  # where LiteLLM asks
    assert short["results"] == minilm_server.http.post(RERANK, json=body).json()["results"]


@pytest.mark.minilm
def test_the_example(minilm_server: RunningServer) -> None:
    texts = ["It rains.", "The cat sleeps on the sofa."]
    command = [sys.executable, str(EXAMPLE), "--base-url", f"{minilm_server.url}/v1", "Where is the kitten?", *texts]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert [line.split("  ")[-1] for line in printed.splitlines()] == [texts[1], texts[0]]


@pytest.mark.minilm
def test_a_client_that_leaves(minilm_server: RunningServer) -> None:
    """What it asked is aborted, and a request of higher priority has not waited for it."""

    def ended() -> float:
        metrics = minilm_server.metrics()
        return sum(metrics[f"ramet_scheduler_{name}_total"] for name in ("aborted", "finished"))

    embed(minilm_server, input="so that there are metrics")
    minilm_server.quiet_metrics(finished=1)
    ended_before, aborted_before = ended(), minilm_server.counter("aborted")
    body = {"model": minilm_server.model, "input": ["word " * 200] * 1000}

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=minilm_server.url, timeout=60) as http:
            asking = asyncio.create_task(http.post(EMBEDDINGS, json=body))
            await asyncio.to_thread(until, lambda: ended() > ended_before, PATIENCE_S, lambda: "at work")
            urgent = {"model": minilm_server.model, "input": "urgent", "priority": -1}
            assert (await http.post(EMBEDDINGS, json=urgent)).status_code == 200
            assert not asking.done()
            asking.cancel()

    asyncio.run(leave())
    until(lambda: ended() == ended_before + 1001, PATIENCE_S, lambda: f"not 1001 ended: {minilm_server.metrics()}")
    assert minilm_server.counter("aborted") - aborted_before > 500


# ---- a decoder, a Matryoshka model ------------------------------------------------------------------------------


def test_a_decoder_embeds_with_its_last_token(tiny_embedder: RunningServer) -> None:
    folder = Path(tiny_embedder.model)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    for ids, vector in zip(([5], [7, 8, 9]), embed(tiny_embedder, input=[[5], [7, 8, 9]]), strict=True):
        with torch.inference_mode():
            last = model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert float(vector @ (last / last.norm()).double().numpy()) > 1 - 1e-6


@pytest.mark.parametrize("dimensions", [16, 32])
def test_embeddings_that_are_cut(tiny_embedder: RunningServer, dimensions: int) -> None:
    [whole] = embed(tiny_embedder, input="a matryoshka")
    [cut] = embed(tiny_embedder, input="a matryoshka", dimensions=dimensions)
    expected = whole[:dimensions] / np.linalg.norm(whole[:dimensions])
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    through_sdk = tiny_embedder.client.embeddings.create(
        model=tiny_embedder.model, input="a matryoshka", dimensions=dimensions
    )
    np.testing.assert_allclose(through_sdk.data[0].embedding, cut, atol=1e-7)


@pytest.mark.parametrize("dimensions", [0, -1, 8, 64, 65])
def test_lengths_that_the_model_was_not_made_for(tiny_embedder: RunningServer, dimensions: int) -> None:
    body = {"model": tiny_embedder.model, "input": "a", "dimensions": dimensions}
    error = error_of(tiny_embedder.http.post(EMBEDDINGS, json=body))
    assert error["param"] == "dimensions"
    assert error["message"] == f"dimensions must be one of 16, 32, got {dimensions}"


def test_metrics_and_readiness_of_a_server_that_embeds(tiny_embedder: RunningServer) -> None:
    before = tiny_embedder.quiet_metrics().get("ramet_scheduler_finished_total", 0)
    embed(tiny_embedder, input=["a", "b", "c"])
    after = tiny_embedder.quiet_metrics(finished=int(before) + 3)
    assert after["ramet_scheduler_finished_total"] == before + 3
    assert after['ramet_kv_pages{state="in_use"}'] == 0
    assert tiny_embedder.http.get("/health_generate").json() == {"status": "ok"}
    info = tiny_embedder.http.get("/get_model_info").json()
    assert (info["is_generation"], info["max_model_len"]) == (False, 130)
    error = error_of(tiny_embedder.http.post("/generate", json={"text": "a"}))
    assert error["code"] == "unsupported_endpoint"


# ---- a server that generates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (EMBEDDINGS, {"input": "a"}),
        (SCORE, {"text_1": "a", "text_2": "b"}),
        (RERANK, {"query": "a", "documents": ["b"]}),
    ],
)
def test_a_server_that_generates_says_how_to_start_one_that_embeds(tiny: RunningServer, path: str, body: Any) -> None:
    error = error_of(tiny.http.post(path, json={"model": tiny.model, **body}))
    assert (error["param"], error["code"]) == (None, "unsupported_endpoint")
    assert "this server generates text" in error["message"]
    assert "--is-embedding" in error["message"]
    with pytest.raises(openai.BadRequestError, match="--is-embedding"):
        tiny.client.embeddings.create(model=tiny.model, input="a")


def test_a_batch(tiny_embedder: RunningServer) -> None:
    client, model = tiny_embedder.client, tiny_embedder.model
    bodies = [{"model": model, "input": f"text {i}", "encoding_format": "float"} for i in range(20)]
    entries = [
        {"custom_id": f"{i}", "method": "POST", "url": EMBEDDINGS, "body": body} for i, body in enumerate(bodies)
    ]
    batch = wait(client, create(client, entries, endpoint=EMBEDDINGS).id)
    output, errors = checked_results(client, batch)
    assert (len(output), errors) == (20, {})
    [online] = embed(tiny_embedder, input="text 7")
    answer = output["7"]["response"]["body"]
    np.testing.assert_allclose(answer["data"][0]["embedding"], online, atol=1e-6)
