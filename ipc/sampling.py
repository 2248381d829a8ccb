"""`SamplingParams`: how one request wants its tokens chosen and when it wants to stop.

Owns the ranges of every parameter (`validate`), so that the HTTP API, the offline API and batches refuse the same
values with the same words. Does not know HTTP, tensors or tokenizers.
"""

import enum
import math

import msgspec

from ramet.ipc.errors import invalid

MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 20
MAX_SOURCE_CHARS = 256 * 1024  # of a grammar


# llguidance's options for JSON: one spelling for each value, that of `json.dumps`, so that a model cannot wander in
# white space, nor write a key a second time as escapes.
JSON_SPELLING = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": '"\\bfnrt',
}


class GrammarKind(enum.StrEnum):
    """How a grammar is written: a JSON schema, a Rust-style regular expression, Lark with llguidance's extensions, or
    EBNF in the notation of llama.cpp's GBNF."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"
    EBNF = "ebnf"


class Thought(msgspec.Struct, frozen=True, array_like=True):
    """A block of reasoning, between two tags, that may stand before what a grammar asks for. `opened`: the prompt ends
    with the first tag."""

    begin: str
    end: str
    opened: bool = False

    def after(self, tail: str) -> "Thought | None":
        """As it is behind a prompt with this end; None if that has closed the block."""
        if (tail := tail.rstrip()).endswith(self.end):
            return None
        return msgspec.structs.replace(self, opened=tail.endswith(self.begin))


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What the whole answer must match. `param` is the request's field that it came from, to be named in errors.
    An answer may match `calls` instead. Either may come behind a `thought`."""

    kind: GrammarKind
    source: str
    param: str
    calls: "Grammar | None" = None
    thought: Thought | None = None

    @property
    def parts(self) -> "list[Grammar]":
        """Those of which an answer matches one, each by itself."""
        own = msgspec.structs.replace(self, calls=None, thought=None)
        return [own] if self.calls is None else [self.calls, own]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling and stopping parameters of one request.

    `max_tokens=None` means the rest of the context. `seed=None` means a fresh one is drawn when the request is
    submitted; on the wire it is always set. `logprobs=k` asks for the sampled token's log-probability and the k most
    likely alternatives; `prompt_logprobs` the same of each prompt token.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        """The most likely token always: temperature 0, or filters that leave only one token."""
        return self.temperature == 0.0 or self.top_k == 1 or self.top_p == 0.0

    @property
    def processed(self) -> bool:
        """Whether a logits processor would change the logits at some step: a bias, bans or penalties."""
        return bool(self.logit_bias or self.min_tokens) or self.penalised

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def reads_tokens(self) -> bool:
        """Whether to compute this request the model runner must know tokens that it does not compute itself."""
        return self.processed or self.prompt_logprobs is not None

    def validate(self) -> None:
        """Raise `RequestError` naming the first parameter out of its range."""
        _between("temperature", self.temperature, 0.0, 2.0)
        _between("top_p", self.top_p, 0.0, 1.0)
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not (0.0 < self.repetition_penalty <= 10.0):
            raise invalid(
                f"repetition_penalty must be above 0 and at most 10, got {self.repetition_penalty}",
                "repetition_penalty",
            )
        if self.top_k < -1:
            raise invalid(f"top_k must be -1 or 0 (off) or a positive count, got {self.top_k}", "top_k")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise invalid(f"max_tokens must be at least 0, got {self.max_tokens}", "max_tokens")
        if self.min_tokens < 0:
            raise invalid(f"min_tokens must be at least 0, got {self.min_tokens}", "min_tokens")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise invalid(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}", "min_tokens")
        if self.seed is not None and not (-(2**63) <= self.seed < 2**63):
            raise invalid(f"seed must fit in 64 bits, got {self.seed}", "seed")
        for token_id, bias in self.logit_bias.items():
            _between(f"logit_bias.{token_id}", bias, -100.0, 100.0)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise invalid(f"at most {MAX_STOP_STRINGS} stop strings, got {len(self.stop)}", "stop")
        if "" in self.stop:
            raise invalid("a stop string must not be empty", "stop")
        for name, count in (("top_logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and not (0 <= count <= MAX_TOP_LOGPROBS):
                raise invalid(f"{name} must be between 0 and {MAX_TOP_LOGPROBS}, got {count}", name)


def _between(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high) or math.isnan(value):
        raise invalid(f"{name} must be between {low:g} and {high:g}, got {value:g}", name)
