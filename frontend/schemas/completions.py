"""The body of `POST /v1/completions`, and its prompt in each of the four forms."""

from ramet.frontend.config import FrontendConfig
from ramet.frontend.schemas.common import GenerationRequest, Int, as_prompts
from ramet.ipc.errors import invalid
from ramet.ipc.sampling import MAX_TOP_LOGPROBS, SamplingParams

DEFAULT_MAX_TOKENS = 16
MAX_BEST_OF = 20


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """`check` must pass before the rest is used. An empty `suffix` is none: nothing has to follow the answer."""

    prompt: str | list[str | Int | list[Int]]
    best_of: Int | None = None
    echo: bool | None = None
    logprobs: Int | None = None
    suffix: str | None = None

    def check(self) -> None:
        self.check_common()
        if self.best_of is not None and not self.choices <= self.best_of <= MAX_BEST_OF:
            raise invalid(f"best_of must be from n ({self.choices}) to {MAX_BEST_OF}, got {self.best_of}", "best_of")
        if self.stream and (self.best_of or 1) > 1:
            raise invalid("best_of above 1 is not allowed with stream: the best are known only at the end", "best_of")
        if self.suffix and self.echo:
            raise invalid("suffix is not allowed with echo", "suffix")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise invalid(f"logprobs must be between 0 and {MAX_TOP_LOGPROBS}, got {self.logprobs}", "logprobs")

    @property
    def candidates(self) -> int:
        """How many choices are generated for each prompt; the best n are returned."""
        return self.choices if self.best_of is None else self.best_of

    def prompts(self, vocab_size: int) -> list[str | list[int]]:
        """One text or list of token ids per prompt."""
        prompts = as_prompts(self.prompt, "prompt", vocab_size, may_be_empty=bool(self.suffix))
        if self.suffix and not all(isinstance(prompt, str) for prompt in prompts):
            raise invalid("suffix needs a prompt that is text, not token ids", "suffix")
        return prompts

    def sampling(self, config: FrontendConfig) -> SamplingParams:
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if max_tokens == 0 and not self.echo:
            raise invalid("max_tokens 0 is only allowed with echo", "max_tokens")
        # The candidates are ranked by their log-probabilities, shown or not.
        logprobs = 0 if self.logprobs is None and self.candidates > self.choices else self.logprobs
        return self.to_sampling(config, max_tokens, logprobs, self.logprobs if self.echo else None)
