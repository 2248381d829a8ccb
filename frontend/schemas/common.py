"""The fields that chat completions and completions share, and how they become `SamplingParams`.

Every field is typed, an unknown one is refused, and null is the same as absent. A field is honoured, or accepted
because it cannot change the answer (`NO_OPS` say why), or refused by `refuse_unsupported` with its name. Ranges of
sampling parameters are checked by `SamplingParams.validate` alone.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

from ramet.frontend.config import FrontendConfig
from ramet.frontend.schemas.grammar import ResponseFormat, only_one, requested_format
from ramet.ipc.errors import invalid
from ramet.ipc.sampling import Grammar, GrammarKind, SamplingParams

# What travels between processes holds 64 bits; msgspec accepts longer ones in JSON.
Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]

# Each chunk of a stream begins with it.
Rid = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]

MAX_CHOICES = 128


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`include_obfuscation` pads OpenAI's chunks against traffic analysis; only its absence is honoured."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen, and when a choice ends. The extras of other engines follow `stop`."""

    n: Int | None = None
    max_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    regex: str | None = None
    ebnf: str | None = None

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    def grammars(self) -> list[Grammar | None]:
        """What the request asks the text of the answer to match; it may ask for one thing only."""
        return [
            None if self.regex is None else Grammar(GrammarKind.REGEX, self.regex, "regex"),
            None if self.ebnf is None else Grammar(GrammarKind.EBNF, self.ebnf, "ebnf"),
        ]

    def to_sampling(
        self, config: FrontendConfig, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The validated parameters; the model's own defaults stand where the request is silent."""
        if not 1 <= self.choices <= MAX_CHOICES:
            raise invalid(f"n must be between 1 and {MAX_CHOICES}, got {self.n}", "n")
        defaults: dict[str, Any] = dict(config.default_sampling)
        if "top_k" in defaults:
            defaults["top_k"] = int(defaults["top_k"])
        # Most fields have the engine's own name and form; the rest are below.
        names = [name for name in SamplingParams.__struct_fields__ if getattr(self, name, None) is not None]
        check_token_ids(self.stop_token_ids or (), config.vocab_size, "stop_token_ids")
        others: dict[str, Any] = {
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
            "logit_bias": _logit_bias(self.logit_bias or {}, config.vocab_size),
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "include_stop_str_in_output": bool(self.include_stop_str_in_output or self.no_stop_trim),
            "grammar": only_one(self.grammars()),
        }
        params = SamplingParams(**{**defaults, **{name: getattr(self, name) for name in names}, **others})
        params.validate()
        return params


class GenerationRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """Fields of both endpoints."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: Int | None = None
    rid: Rid | None = None
    response_format: ResponseFormat | None = None

    def grammars(self) -> list[Grammar | None]:
        return [requested_format(self.response_format), *super().grammars()]

    def check_common(self) -> None:
        """Raise `RequestError` for what is wrong with the fields of this class that are not sampling parameters."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed when stream is true", "stream_options")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise _unsupported("stream_options.include_obfuscation")


def refuse_unsupported(request: msgspec.Struct, names: Iterable[str]) -> None:
    """A parameter that changes the answer and is not built must not be ignored."""
    for name in names:
        if getattr(request, name) is not None:
            raise _unsupported(name)


def _unsupported(name: str) -> Exception:
    return invalid(f"{name} is not supported by this server", name, "unsupported_parameter")


def as_prompts(
    value: str | list[str | int | list[int]], param: str, vocab_size: int, may_be_empty: bool = False
) -> list[str | list[int]]:
    """One text or list of token ids per prompt, from each of the four forms. Raises `RequestError`."""
    if isinstance(value, str):
        prompts: list[str | list[int]] = [value]
    elif value and all(isinstance(item, int) for item in value):
        prompts = [[item for item in value if isinstance(item, int)]]
    else:
        prompts = [item for item in value if not isinstance(item, int)]
        if len({type(item) for item in value}) > 1:
            raise invalid(f"the items of {param} must all be strings, token ids or lists of token ids", param)
    if not prompts or not (may_be_empty or all(prompts)):
        raise invalid(f"{param} must not be empty", param)
    for prompt in prompts:
        if not isinstance(prompt, str):
            check_token_ids(prompt, vocab_size, param)
    return prompts


def check_token_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise invalid(f"{param}: token id {token_id} is not in the vocabulary of {vocab_size} tokens", param)


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise invalid(f"logit_bias: keys must be token ids, got {key!r}", "logit_bias")
        result[int(key)] = value
    check_token_ids(result, vocab_size, "logit_bias")
    return result
