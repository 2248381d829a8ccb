"""The body of SGLang's native `POST /generate`.

`null` is the same as absent. What is not built is refused by name unless it is false or empty, because benchmark
programs send every field. Errors name the fields as they are called here.
"""

import re
from typing import Any

import msgspec

from ramet.frontend.config import FrontendConfig
from ramet.frontend.schemas.common import Int, Rid, SamplingFields, as_prompts, refuse_unsupported
from ramet.frontend.schemas.grammar import json_grammar
from ramet.ipc.errors import RequestError, invalid
from ramet.ipc.sampling import Grammar, SamplingParams

DEFAULT_MAX_NEW_TOKENS = 128

_SAMPLING_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}
# Here by the names that the engine has for them.
_NAMES = {**_SAMPLING_NAMES, "top_logprobs": "top_logprobs_num", "prompt_logprobs": "top_logprobs_num"}


class NativeSampling(SamplingFields, kw_only=True, forbid_unknown_fields=True, rename=_SAMPLING_NAMES):
    # Named again, because a new name is given only to a class's own fields.
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    seed: Int | None = None
    json_schema: str | dict[str, Any] | None = None

    def grammars(self) -> list[Grammar | None]:
        schema = self.json_schema
        return [None if schema is None else json_grammar(schema, "json_schema"), *super().grammars()]


class _NotBuilt(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that are known, and refused unless they ask for nothing."""

    input_embeds: Any = None
    image_data: Any = None
    lora_path: Any = None
    token_ids_logprob: Any = None
    return_hidden_states: Any = None
    return_routed_experts: Any = None
    session_params: Any = None
    custom_logit_processor: Any = None


class GenerateRequest(_NotBuilt, kw_only=True, forbid_unknown_fields=True):
    """`logprob_start_len` is the first position of the prompt whose log-probability is wanted; -1, the default, wants
    none. `return_text_in_logprobs` adds the texts to the ids of tokens there."""

    text: str | list[str] | None = None
    input_ids: list[Int | list[Int]] | None = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    rid: Rid | list[Rid] | None = None
    stream: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: Int | None = None
    top_logprobs_num: Int | None = None
    return_text_in_logprobs: bool | None = None
    priority: Int | None = None

    def prompts(self, vocab_size: int) -> list[str | list[int]]:
        """Raises `RequestError` for what is wrong outside of `sampling_params`."""
        refuse_unsupported(self, (name for name in _NotBuilt.__struct_fields__ if getattr(self, name)))
        if (self.text is None) == (self.input_ids is None):
            raise invalid("give either text or input_ids", "text")
        if self.start < -1:
            raise invalid(f"logprob_start_len must be at least -1, got {self.start}", "logprob_start_len")
        for name, wanted in (("logprob_start_len", self.start >= 0), ("top_logprobs_num", self.top_logprobs_num)):
            if wanted and not self.return_logprob:
                raise invalid(f"{name} is only allowed when return_logprob is true", name)
        prompt: Any = self.input_ids if self.text is None else self.text
        prompts = as_prompts(prompt, "prompt", vocab_size)
        for name in ("sampling_params", "rid"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(prompts):
                raise invalid(f"{name} has {len(value)} items for {len(prompts)} prompts", name)
        return prompts

    @property
    def start(self) -> int:
        return -1 if self.logprob_start_len is None else self.logprob_start_len

    @property
    def is_batch(self) -> bool:
        """Whether the prompts, which have been checked, came as a list."""
        return isinstance(self.text, list) or (self.input_ids is not None and isinstance(self.input_ids[0], list))

    def sampling(self, config: FrontendConfig, count: int) -> tuple[int, list[SamplingParams]]:
        """The number of choices, and the parameters of each of `count` prompts."""
        given = self.sampling_params or NativeSampling()
        each = given if isinstance(given, list) else [given] * count
        if len({item.choices for item in each}) > 1:
            raise invalid("n must be the same for all prompts of a request", "n")
        logprobs = (self.top_logprobs_num or 0) if self.return_logprob else None
        of_prompt = logprobs if self.start >= 0 else None
        most = [DEFAULT_MAX_NEW_TOKENS if item.max_tokens is None else item.max_tokens for item in each]
        params = [item.to_sampling(config, n, logprobs, of_prompt) for item, n in zip(each, most, strict=True)]
        return each[0].choices, params

    def rids(self, count: int) -> list[str | None]:
        return list(self.rid) if isinstance(self.rid, list) else [self.rid] * count

    def renamed(self, error: RequestError) -> RequestError:
        """The error with the names of this body."""
        names = {**_NAMES, "prompt": "text" if self.input_ids is None else "input_ids"}
        failure = error.failure
        head, rest = re.match(r"(\w*)(.*)", failure.param or "").groups()  # type: ignore[union-attr]
        head = names.get(head, head)
        if head in NativeSampling.__struct_encode_fields__:
            head = f"sampling_params.{head}"
        message = re.sub("|".join(rf"\b{name}\b" for name in _NAMES), lambda found: _NAMES[found[0]], failure.message)
        return RequestError(failure.kind, message, param=head + rest or None, code=failure.code)
