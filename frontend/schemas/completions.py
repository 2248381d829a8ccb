"""The body of `POST /v1/completions`, and its prompt in each of the four forms."""

from ramet.frontend.config import FrontendConfig
from ramet.frontend.schemas.common import GenerationRequest, Int, check_token_ids, refuse_unsupported
from ramet.ipc.errors import RequestError, invalid
from ramet.ipc.sampling import MAX_TOP_LOGPROBS, SamplingParams

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """`check` must pass before the rest is used."""

    prompt: str | list[str | Int | list[Int]]
    best_of: Int | None = None
    echo: bool | None = None
    logprobs: Int | None = None
    suffix: str | None = None

    def check(self) -> None:
        self.check_common()
        refuse_unsupported(self, ("suffix",))
        if self.best_of is not None and self.best_of < self.choices:
            raise invalid(f"best_of must be at least n ({self.choices}), got {self.best_of}", "best_of")
        if self.best_of is not None and self.best_of > self.choices:
            raise invalid(
                f"best_of above n ({self.choices}) is not supported by this server, got {self.best_of}",
                "best_of",
                "unsupported_parameter",
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise invalid(f"logprobs must be between 0 and {MAX_TOP_LOGPROBS}, got {self.logprobs}", "logprobs")

    def prompts(self, vocab_size: int) -> list[str | list[int]]:
        """One text or list of token ids per prompt."""
        if isinstance(self.prompt, str):
            prompts: list[str | list[int]] = [self.prompt]
        elif self.prompt and all(isinstance(item, int) for item in self.prompt):
            prompts = [[item for item in self.prompt if isinstance(item, int)]]
        else:
            prompts = [item for item in self.prompt if not isinstance(item, int)]
            if len({type(item) for item in self.prompt}) > 1:
                raise _bad_prompt("the items of prompt must all be strings, token ids or lists of token ids")
        if not prompts or not all(prompts):
            raise _bad_prompt("prompt must not be empty")
        for prompt in prompts:
            if not isinstance(prompt, str):
                check_token_ids(prompt, vocab_size, "prompt")
        return prompts

    def sampling(self, config: FrontendConfig) -> SamplingParams:
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if max_tokens == 0 and not self.echo:
            raise invalid("max_tokens 0 is only allowed with echo", "max_tokens")
        return self.to_sampling(config, max_tokens, self.logprobs, self.logprobs if self.echo else None)


def _bad_prompt(message: str) -> RequestError:
    return invalid(message, "prompt")
