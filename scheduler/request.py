"""`Request`: all that the scheduler knows of one request, as plain data.

The one counter that drives scheduling: `num_computed` catches up with `len(tokens)`. A prompt, a chunk of it, a decode
step and the resumption after a preemption differ only in how far behind it is.
"""

from llguidance import LLMatcher

from ramet.ipc.messages import Generate, Logprob
from ramet.ipc.sampling import SamplingParams
from ramet.scheduler.radix_cache import Node


class Request:
    """`tokens`: prompt, then generated. `pages[:num_shared]` belong to the radix tree (locked at `node`), the rest to
    this request. `slot`: its place in the model runner while it runs, else None."""

    __slots__ = (
        "admitted_sent",
        "announced",
        "arrival",
        "cached_tokens",
        "echo",
        "matcher",
        "max_tokens",
        "node",
        "num_computed",
        "num_granted",
        "num_shared",
        "page_hashes",
        "pages",
        "params",
        "priority",
        "prompt_len",
        "prompt_logprobs",
        "prompt_tail",
        "rid",
        "scheduled_at",
        "slot",
        "stop_ids",
        "stream",
        "tokenized_at",
        "tokens",
    )

    def __init__(
        self,
        message: Generate,
        arrival: int,
        max_tokens: int,
        eos_ids: tuple[int, ...],
        matcher: LLMatcher | None = None,
    ) -> None:
        params = message.params
        self.rid = message.rid
        self.tokens = list(message.prompt_ids)
        self.prompt_len = len(message.prompt_ids)
        self.params: SamplingParams = params
        self.max_tokens = max_tokens
        self.matcher = matcher  # where the generated tokens stand in the grammar
        self.stop_ids = frozenset(params.stop_token_ids if params.ignore_eos else (*eos_ids, *params.stop_token_ids))
        self.priority = message.priority
        self.arrival = arrival
        self.echo = message.echo
        self.stream = message.stream
        self.prompt_tail = message.prompt_tail
        self.tokenized_at = message.tokenized_at
        self.scheduled_at = 0.0  # at the first admission
        self.num_computed = 0
        self.slot: int | None = None
        self.announced = False  # whether the runner has heard of it since it took its slot
        self.pages: list[int] = []
        self.num_shared = 0
        self.num_granted = 0  # pages that the runner has been told of
        self.node: Node | None = None
        self.page_hashes: list[int] = []
        self.cached_tokens: int | None = None  # at the first admission
        self.prompt_logprobs: list[Logprob] = []
        self.admitted_sent = False

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def num_remaining(self) -> int:
        """Known tokens that are not computed yet: 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def awaits_first_token(self) -> bool:
        """Whether somebody waits for its prompt to be computed (again, after a preemption)."""
        return self.num_generated == 0 or self.num_remaining > 1

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: who comes first, is served first and preempted last."""
        return (self.priority, self.arrival)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some prompt token's log-probability is still owed."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_len - 1
