"""The offline API: `Engine` runs the processes of a server, and its user's own process takes the frontend's place.

Knows neither HTTP nor the scheduler: an `EngineClient` asks, as in the frontend. Every call runs in one event loop, in
a thread of its own, so that the methods work in plain programs, under pytest and inside a running loop alike.

Invariants: once `close()` returns, no process, thread or socket of the engine is left; it also runs when the engine is
garbage or the interpreter ends, and the kernel kills the processes if this one is killed. A call survives the death of
a process of the engine, once; leaving a call early (Ctrl-C, a cancelled task, a `break`) aborts its requests.
"""

import asyncio
import functools
import typing
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from ramet.frontend.errors import invalid_json
from ramet.frontend.schemas.chat import ChatRequest
from ramet.frontend.schemas.common import check_token_ids
from ramet.frontend.schemas.completions import CompletionRequest
from ramet.frontend.schemas.tokenize import CHAT_ONLY
from ramet.ipc.errors import RequestError, invalid
from ramet.ipc.messages import Chat, Completion, Embedding, FinishReason, Job, TextDelta, TokenText
from ramet.ipc.sampling import SamplingParams
from ramet.launch.host import EngineHost
from ramet.launch.serve import configure
from ramet.launch.server_args import ConfigError, ServerArgs

T = TypeVar("T")
Prompt = str | list[int]
Conversation = list[dict[str, Any]]
Make = Callable[[Job], Chat | Completion]

_LISTS = (list, tuple)

# Settings of `ServerArgs` that mean nothing without HTTP, besides the group "server"; of that, those that do.
_HTTP_ONLY = {"file_storage_path", "node_rank", "reasoning_parser", "served_model_name", "tool_call_parser"}
_NOT_HTTP = {"log_format", "log_level", "max_restarts", "start_timeout", "watchdog_timeout"}


class Output(msgspec.Struct, frozen=True):
    """One answer. `matched_stop` is the token id or the string that ended it. `logprobs` has an entry per token, and
    `prompt_logprobs` per token of the prompt, where they were asked; the prompt's first `logprob` is NaN, since nothing
    predicts it."""

    text: str
    finish_reason: FinishReason
    matched_stop: int | str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    logprobs: list[TokenText] | None
    prompt_logprobs: list[TokenText] | None


class Engine:
    """`with Engine(model_path=…) as engine:`; the settings are the server's flags, with underscores.

    A prompt is a text or a list of token ids, and a list of prompts gives a list of outputs in its order; any number
    may be given, of which `max_queued_requests` are in the engine at a time. Without `params` the model's own defaults
    hold, and an answer may take the rest of the context. All methods raise `RequestError`, in the words of the HTTP
    API, for what cannot be honoured; RuntimeError after `close()`. If a process of the engine dies, a call waits until
    it is there again, and its requests are computed anew; one that is under way at a second death raises, and so do all
    if the engine cannot be started again.
    The methods with `a` in front are for a running event loop.
    """

    def __init__(self, model_path: str | Path | None = None, **settings: Any) -> None:
        """Returns when the engine is ready. Raises ModelUnavailable, ConfigError or EngineFailed."""
        args = _server_args(model_path, settings)
        self._config = configure(args)
        self._defaults = msgspec.convert(self._config.frontend.default_sampling, SamplingParams)
        self._host = EngineHost(args, self._config)
        weakref.finalize(self, self._host.close)

    def close(self) -> None:
        """End the processes, and with an error the calls that are under way. It may be called again."""
        self._host.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompts: Any, params: Any = None, *, n: int = 1) -> Any:
        """Continue a prompt, or each of a list of them, with one `SamplingParams` for all or a list of them. The answer
        to a prompt is an `Output`, or a list of `n` of them if n is above 1."""
        return self._host.wait(self._generate(prompts, params, n))

    async def agenerate(self, prompts: Any, params: Any = None, *, n: int = 1) -> Any:
        return await self._host.run(self._generate(prompts, params, n))

    def chat(self, conversations: Any, params: Any = None, *, n: int = 1, **options: Any) -> Any:
        """Answer a conversation (a list of messages) or each of a list of them. `options`: `tools`, which the chat
        template shows to the model, `chat_template_kwargs`, `add_generation_prompt`, `continue_final_message`."""
        return self._host.wait(self._chat(conversations, params, n, options))

    async def achat(self, conversations: Any, params: Any = None, *, n: int = 1, **options: Any) -> Any:
        return await self._host.run(self._chat(conversations, params, n, options))

    def embed(self, texts: Prompt | Sequence[Prompt]) -> np.ndarray:
        """float32 `[dim]` of one text, `[len(texts), dim]` of a list. Only models that embed can."""
        return self._host.wait(self._embed(texts))

    async def aembed(self, texts: Prompt | Sequence[Prompt]) -> np.ndarray:
        return await self._host.run(self._embed(texts))

    def stream(self, prompt: Prompt | Conversation, params: SamplingParams | None = None) -> Iterator[str]:
        """The text that continues a prompt, or answers a conversation, in pieces as it comes."""
        pieces = self._pieces(prompt, params)
        try:
            while (text := self._host.wait(_next(pieces))) is not None:
                yield text
        finally:
            self._host.drop(pieces)

    async def astream(self, prompt: Prompt | Conversation, params: SamplingParams | None = None) -> AsyncIterator[str]:
        pieces = self._pieces(prompt, params)
        try:
            while (text := await self._host.run(_next(pieces))) is not None:
                yield text
        finally:
            self._host.drop(pieces)

    # ---- in the engine's own loop ---------------------------------------------------------------------------------

    async def _generate(self, prompts: Any, params: Any, n: int) -> Any:
        makes: list[Make] = [functools.partial(Completion, prompt=prompt) for prompt in self._prompts(prompts)]
        outputs = await self._outputs(makes, params, n)
        return outputs[0] if _is_one(prompts) else outputs

    async def _chat(self, conversations: Any, params: Any, n: int, options: dict[str, Any]) -> Any:
        many = isinstance(conversations, _LISTS) and all(isinstance(item, _LISTS) for item in conversations)
        makes = [self._conversation(messages, **options) for messages in (conversations if many else [conversations])]
        outputs = await self._outputs(makes, params, n)
        return outputs if many else outputs[0]

    async def _outputs(self, makes: list[Make], params: Any, n: int) -> list[Output | list[Output]]:
        each = list(params) if isinstance(params, _LISTS) else [params] * len(makes)
        if len(each) != len(makes):
            raise invalid(f"{len(makes)} prompts need as many params, got {len(each)}", "params")
        most = self._config.frontend.max_queued_requests
        if not (isinstance(n, int) and 1 <= n <= most):
            raise invalid(f"n must be a number from 1 to max_queued_requests ({most}), got {n!r}", "n")
        return await _all([functools.partial(self._whole, *pair, n) for pair in zip(makes, each, strict=True)])

    async def _whole(self, make: Make, params: SamplingParams | None, n: int) -> Output | list[Output]:
        checked = self._checked(params)
        async with self._host.places(n):
            with self._host.client.submit([make], checked, n=n, stream=False) as generation:
                outputs = list(map(_output, await generation.whole()))
        return outputs if n > 1 else outputs[0]

    async def _pieces(self, prompt: Any, params: SamplingParams | None) -> AsyncGenerator[str, None]:
        text = _is_one(prompt)
        make = functools.partial(Completion, prompt=self._prompts(prompt)[0]) if text else self._conversation(prompt)
        async with self._host.places(1):
            with self._host.client.submit([make], self._checked(params)) as generation:
                while changes := await generation.change():
                    if piece := "".join([delta.text for _, delta in changes]):
                        yield piece

    async def _embed(self, texts: Any) -> np.ndarray:
        rows = await _all([functools.partial(self._vector, prompt) for prompt in self._prompts(texts)])
        return rows[0] if _is_one(texts) else np.stack(rows) if rows else np.empty((0, 0), np.float32)

    async def _vector(self, prompt: Prompt) -> np.ndarray:
        async with self._host.places(1):
            with self._host.client.ask([lambda rid: Embedding(rid, prompt)]) as asked:
                [answer] = await asked.answers()
        return np.frombuffer(answer.vector, "<f4")

    def _prompts(self, given: Any) -> list[Prompt]:
        """What `given` holds, checked as by the HTTP API."""
        if not isinstance(given, (str, *_LISTS)):
            words = "a prompt must be a text or a list of token ids, and several a list of these"
            raise invalid(f"{words}, got {type(given).__name__}", "prompt", "invalid_type")
        if isinstance(given, _LISTS) and not given:
            return []
        return _convert({"model": "", "prompt": given}, CompletionRequest).prompts(self._config.frontend.vocab_size)

    def _conversation(self, messages: Any, **options: Any) -> Make:
        if unknown := options.keys() - set(CHAT_ONLY):
            raise invalid(f"{min(unknown)} is none of {', '.join(CHAT_ONLY)}", min(unknown), "unknown_parameter")
        request = _convert({"model": "", "messages": messages, **options}, ChatRequest)
        request.check()
        return request.prompt(self._config.frontend)

    def _checked(self, params: SamplingParams | None) -> SamplingParams:
        """Structs do not check the types they are made with, and what does not decode would never be answered."""
        if params is None:
            return self._defaults
        if not isinstance(params, SamplingParams):
            words = "params must be SamplingParams, or a list of one for each prompt"
            raise invalid(f"{words}, got {type(params).__name__}", "params", "invalid_type")
        checked: SamplingParams = _convert(msgspec.structs.asdict(params), SamplingParams)
        checked.validate()
        for name in ("logit_bias", "stop_token_ids"):
            check_token_ids(getattr(checked, name), self._config.frontend.vocab_size, name)
        return checked


def _server_args(model_path: str | Path | None, settings: dict[str, Any]) -> ServerArgs:
    """Raises ConfigError."""
    hints = typing.get_type_hints(ServerArgs, include_extras=True)
    for name in settings.keys() - _NOT_HTTP:
        metas = typing.get_args(hints.get(name))
        if name in _HTTP_ONLY or (metas and metas[-1].extra_json_schema["group"] == "server"):
            raise ConfigError(f"{name} is a setting of the HTTP server, which an Engine does not have")
    given = {"model_path": None if model_path is None else str(model_path), "log_level": "warning", **settings}
    try:
        return msgspec.convert(given, ServerArgs)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error).replace("`$.", "`")) from None


def _is_one(prompts: Any) -> bool:
    """Else it is a list of prompts, or of messages."""
    return not isinstance(prompts, _LISTS) or (bool(prompts) and isinstance(prompts[0], int))


def _convert(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise invalid_json(error) from None


async def _all(works: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """The results in order; the first failure cancels the rest, and is raised with the number of its prompt."""

    async def numbered(index: int, work: Callable[[], Awaitable[T]]) -> T:
        try:
            return await work()
        except RequestError as error:
            if len(works) > 1:
                error.add_note(f"in number {index} of {len(works)}, counted from 0")
            raise

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(numbered(index, work)) for index, work in enumerate(works)]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def _output(delta: TextDelta) -> Output:
    assert delta.prompt is not None and delta.finish is not None
    return Output(
        text=delta.text,
        finish_reason=delta.finish.reason,
        matched_stop=delta.finish.matched,
        prompt_tokens=delta.prompt.prompt_tokens,
        cached_tokens=delta.prompt.cached_tokens,
        completion_tokens=delta.completion_tokens,
        logprobs=delta.logprobs,
        prompt_logprobs=delta.prompt.tokens,
    )


async def _next(pieces: AsyncGenerator[str, None]) -> str | None:
    return await anext(pieces, None)
