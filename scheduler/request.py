"""`Request`: all that the scheduler knows of one request, as plain data.

The one counter that drives scheduling: `num_computed` catches up with the tokens. A prompt, a chunk of it, a decode
step and the resumption after a preemption differ only in how far behind it is. It counts what has been planned: a step
whose result is not here yet may have sampled a token that only the device knows (`num_in_flight`), and `num_stored` is
behind by what such steps compute.
"""

from array import array

from ramet.ipc.messages import Generate, Logprob, PromptInfo
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import UNKNOWN_TOKEN, PageGrant, Row
from ramet.scheduler.grammar import Matcher
from ramet.scheduler.radix_cache import Node

TOKEN_BYTES = 4  # of a key of the radix tree


class Request:
    """`pages[:num_shared]` belong to the radix tree (locked at `node`), the rest to
    this request. `slot`: its place in the model runner while it runs, else None."""

    def __init__(
        self,
        message: Generate,
        arrival: int,
        max_tokens: int,
        eos_ids: tuple[int, ...],
        matcher: Matcher | None = None,
    ) -> None:
        params = message.params
        self.rid = message.rid
        self.generated: list[int] = []
        self.prompt_len = len(message.prompt_ids)
        self.params: SamplingParams = params
        self.max_tokens = max_tokens
        self.matcher = matcher  # where the generated tokens stand in the grammar
        self.stop_ids = frozenset(params.stop_token_ids if params.ignore_eos else (*eos_ids, *params.stop_token_ids))
        self.priority = message.priority
        self.arrival = arrival
        self.echo = message.echo
        self.stream = message.stream
        self.info: PromptInfo = message.prompt  # complete from the first admission on
        self.prompt_logprobs: list[Logprob] = []
        self.num_computed = 0
        self.num_stored = 0  # computed by steps that have been committed
        self.num_in_flight = 0  # tokens sampled by steps that have not
        self.slot: int | None = None
        self.announced = False  # whether the runner has heard of it since it took its slot
        self.pages: list[int] = []
        self.num_shared = 0
        self.num_granted = 0  # pages that the runner has been told of
        self.node: Node | None = None
        # Who computes the next pages of this one's prompt, and up to which page the two have them in common.
        self.awaits: tuple[Request, int] | None = None
        # A list of so many ints would cost every collection of garbage more than the bytes ever do.
        self._key = array("I", message.prompt_ids).tobytes()

    @property
    def key(self) -> bytes:
        """The tokens, prompt and then generated, as the radix tree compares them."""
        if missing := self.generated[len(self._key) // TOKEN_BYTES - self.prompt_len :]:
            self._key += array("I", missing).tobytes()
        return self._key

    def tokens(self, start: int, end: int) -> list[int]:
        return array("I", self.key[start * TOKEN_BYTES : end * TOKEN_BYTES]).tolist()

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + len(self.generated)

    @property
    def num_remaining(self) -> int:
        """Tokens that could be computed now: 1 while decoding. 0 while the host must first see the token in flight:
        the grammar needs it, or it is the last."""
        if self.num_in_flight and (self.matcher or len(self.generated) + self.num_in_flight >= self.max_tokens):
            return 0
        return self.prompt_len + len(self.generated) + self.num_in_flight - self.num_computed

    @property
    def awaits_first_token(self) -> bool:
        """Whether somebody waits for its prompt to be computed (again, after a preemption)."""
        return not (self.generated or self.num_in_flight) or self.num_remaining > 1

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: who comes first, is served first and preempted last."""
        return (self.priority, self.arrival)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some prompt token's log-probability is still owed."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_len - 1

    def plan_row(self, length: int) -> Row:
        """The next `length` tokens; the last of all, once computed, gives the next."""
        assert self.slot is not None
        start, sample = self.num_computed, self.num_remaining == length and self.max_tokens > 0
        scored = self.wants_prompt_logprobs and start < self.prompt_len - 1
        self.num_computed += length
        self.num_in_flight += sample
        return Row(self.slot, start, length, sample, scored)

    def inputs(self, row: Row) -> list[int]:
        """The tokens of a planned row; what only the device knows is a row of its own."""
        if (first := row.start - self.prompt_len) < 0:
            return self.tokens(row.start, row.start + row.length)
        return self.generated[first : first + row.length] or [UNKNOWN_TOKEN]

    def take_grant(self) -> PageGrant:
        """Pages that the runner has not been told of; from now on it has."""
        assert self.slot is not None
        first, self.num_granted = self.num_granted, len(self.pages)
        return PageGrant(self.slot, first, self.pages[first:])
