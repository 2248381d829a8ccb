"""`ramet bench serve`: sends a workload to any OpenAI-compatible server and records what each request was answered.

Requests are made beforehand, so that the client does little while the clock runs; the CPU time that it takes is part of
the result. A request's time starts before its connection is looked for.
"""

import asyncio
import random
import sys
import time
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
import tqdm
import uvloop
from msgspec import Meta

from ramet.launch.bench.answer import Answer, Record
from ramet.launch.bench.http_client import Client, RequestFailed
from ramet.launch.bench.workload import WORDS, Item, Scale, Workload, arrival_times, bounds, draw_items, flag

_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
# Sizes of the two prompts from which the tokens of a word are learnt.
_PROBE_WORDS = (16, 272)
_CONCURRENCY = 8


class LoadArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The flags of `ramet bench serve` beside those of `Workload`."""

    base_url: Annotated[str, flag("the server; /v1 is added where there is no path")] = "http://127.0.0.1:30000"
    model: Annotated[str | None, flag("the name to ask for (the first of /v1/models)")] = None
    api_key: Annotated[str | None, flag("sent as a bearer token")] = None
    endpoint: Annotated[Literal["chat", "completions"], flag("what is called")] = "completions"
    prompts: Annotated[Literal["text", "token-ids"], flag("token-ids have exact lengths (completions)")] = "text"
    token_id_range: Annotated[str, flag("the ids of token-ids prompts")] = "1000-9999"
    concurrency: Annotated[Annotated[int, Meta(ge=1)] | None, flag("requests under way at any time (8)")] = None
    request_rate: Annotated[
        Annotated[float, Meta(gt=0)] | None, flag("instead: mean arrivals per second (Poisson), answered or not")
    ] = None
    no_stream: Annotated[bool, flag("ask for whole answers")] = False
    no_keep_alive: Annotated[bool, flag("a connection for each request")] = False
    extra_body: Annotated[str, flag("JSON object to merge into each body; null takes a field out")] = "{}"
    warmup: Annotated[int, flag("requests before the clock starts", ge=0)] = 2
    timeout: Annotated[float, flag("seconds until a request counts as failed", gt=0, le=86_400)] = 600.0
    details: Annotated[bool, flag("put every request into the --json file")] = False
    html: Annotated[str | None, flag("write a page with plots to this file")] = None

    def __post_init__(self) -> None:
        bounds("token_id_range", self.token_id_range)
        if self.concurrency is not None and self.request_rate is not None:
            raise ValueError("concurrency and request_rate exclude each other")
        if self.prompts == "token-ids" and self.endpoint == "chat":
            raise ValueError("prompts token-ids needs endpoint completions")
        self.extra()

    def extra(self) -> dict[str, Any]:
        try:
            return msgspec.json.decode(self.extra_body, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise ValueError(f"extra_body is not a JSON object: {error}") from error


class Outcome(msgspec.Struct):
    """One record for each request that was sent. `client_cpu_s` is this process's own CPU time of the run."""

    model: str
    records: list[Record]
    wall_s: float
    client_cpu_s: float


def run_load(load: Workload, args: LoadArgs) -> Outcome:
    """Raises RequestFailed if the server cannot be asked at all. Ctrl-C ends the run early, with what there is."""
    return uvloop.run(_Run(load, args).run())


class _Run:
    def __init__(self, load: Workload, args: LoadArgs) -> None:
        self._load, self._args = load, args
        self._client = Client(args.base_url, args.api_key, not args.no_keep_alive, args.timeout)
        self._model = args.model or ""
        low, high = bounds("token_id_range", args.token_id_range)
        self._vocabulary = WORDS if args.prompts == "text" else range(low, high + 1)

    async def run(self) -> Outcome:
        self._model = self._model or await self._first_model()
        scale = await self._learn_scale() if self._args.prompts == "text" else Scale()
        await self._send_all(self._requests("warm-up", self._args.warmup, scale), [])
        requests = self._requests("measured", self._load.num_requests, scale)
        records: list[Record] = []
        started_s, cpu_s = time.perf_counter(), time.process_time()
        try:
            await self._send_all(requests, records)
        except asyncio.CancelledError:  # Ctrl-C
            sys.stderr.write("interrupted\n")
        wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
        self._client.close()
        for record in records:
            record.sent_s -= started_s
        return Outcome(self._model, records, wall_s, cpu_s)

    async def _first_model(self) -> str:
        parts: list[bytes] = []
        status = await self._client.send(self._client.request("GET", "/models"), lambda _, data: parts.append(data))
        try:
            return str(msgspec.json.decode(b"".join(parts))["data"][0]["id"])
        except (msgspec.MsgspecError, LookupError, TypeError) as error:
            words = f"/models was answered with status {status} and names no model: give --model"
            raise RequestFailed("no model", words) from error

    async def _learn_scale(self) -> Scale:
        """From the server's counts for a short and a long prompt. Without counts a word is taken for a token."""
        tokens = []
        for number, words in enumerate(_PROBE_WORDS):
            item = Item(random.Random(f"{self._load.seed} probe {number}").choices(WORDS, k=words), words, 1)
            record = await self._send(0, item, self._encode(item, 0), [])
            if record.error is not None:
                raise RequestFailed(record.error, f"the server does not answer a prompt: {record.message}")
            tokens.append(record.input_tokens or words)
        per_word = (tokens[1] - tokens[0]) / (_PROBE_WORDS[1] - _PROBE_WORDS[0]) or 1.0
        return Scale(tokens[0] - _PROBE_WORDS[0] * per_word, per_word)

    def _requests(self, name: str, count: int, scale: Scale) -> list[tuple[Item, bytes]]:
        items = draw_items(self._load, self._vocabulary, scale, name, count)
        return [(item, self._encode(item, index)) for index, item in enumerate(items)]

    def _encode(self, item: Item, index: int) -> bytes:
        args, load = self._args, self._load
        text = " ".join(item.units) if args.prompts == "text" else item.units
        prompt = {"messages": [{"role": "user", "content": text}]} if args.endpoint == "chat" else {"prompt": text}
        body: dict[str, Any] = {
            "model": self._model,
            **prompt,
            "max_tokens": item.output_len,
            "temperature": load.temperature,
            "seed": load.seed + index if load.temperature > 0 else None,
            "ignore_eos": load.ignore_eos or None,
            "stream": not args.no_stream or None,
            "stream_options": None if args.no_stream else {"include_usage": True},
            **args.extra(),
        }
        sent = {name: value for name, value in body.items() if value is not None}
        return self._client.request("POST", _PATHS[args.endpoint], msgspec.json.encode(sent))

    async def _send_all(self, requests: list[tuple[Item, bytes]], records: list[Record]) -> None:
        jobs, rate, started_s = iter(enumerate(requests)), self._args.request_rate, time.perf_counter()
        bar = tqdm.tqdm(total=len(requests), unit="request", disable=None)

        async def work(jobs: Iterable[tuple[int, tuple[Item, bytes]]]) -> None:
            for index, (item, request) in jobs:
                await self._send(index, item, request, records)
                bar.update()

        with bar:
            async with asyncio.TaskGroup() as group:
                if rate is None:
                    for _ in range(self._args.concurrency or _CONCURRENCY):
                        group.create_task(work(jobs))  # all take from the same ones
                    return
                for job, at_s in zip(jobs, arrival_times(self._load.seed, rate), strict=False):
                    await asyncio.sleep(started_s + at_s - time.perf_counter())
                    group.create_task(work([job]))

    async def _send(self, index: int, item: Item, request: bytes, records: list[Record]) -> Record:
        sent_s = time.perf_counter()
        record = Record(index=index, sent_s=sent_s, input_len=item.input_len, output_len=item.output_len)
        records.append(record)
        answer = Answer(record, stream=not self._args.no_stream)
        try:
            status = await self._client.send(
                request, lambda status, data: answer.feed(status, data, time.perf_counter() - sent_s)
            )
            answer.finish(status)
            record.error = None
        except RequestFailed as error:
            record.error, record.message = error.kind, str(error)
        record.e2e_s = time.perf_counter() - sent_s
        return record
