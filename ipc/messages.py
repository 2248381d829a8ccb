"""Every message that travels between processes, as tagged msgspec structs.

The path of a generation: `Chat`/`Completion` (frontend to tokenizer worker) becomes `Generate` (to the scheduler),
whose tokens travel as `TokenBatch` (to the detokenizer) and `TextBatch` (back to the frontend). `Failed` may come from
any of them and goes to the frontend. `Abort` takes the same way as its request, so that it can never overtake it.

`Embedding`, `Tokenize`, `Detokenize` and `FlushCache` are questions with one `Answer`.

Invariant: each request id ends, at the frontend, in exactly one `TextDelta` with `finish` set, one `Answer`, or one
`Failed`.
"""

import enum
from typing import Any

import msgspec

from ramet.ipc.errors import Failure
from ramet.ipc.sampling import SamplingParams


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of the tagged unions below."""


# ---- frontend -> tokenizer worker -------------------------------------------------------------------------------


class Job(msgspec.Struct, frozen=True, array_like=True):
    """What a prompt's choices have in common. `rids` holds one request id per choice (n of them).

    `priority`: a lower number is scheduled first (0 is the default of interactive requests).
    `echo`: the text of the prompt is wanted back with the first event. `stream`: text is wanted as it comes; without
    it only the first event and the last one are sent. A seed is that of the first choice; choice i has `seed + i`.
    """

    rids: list[str]
    params: SamplingParams
    priority: int = 0
    echo: bool = False
    stream: bool = True


class Completion(Message, frozen=True):
    """A prompt as text (special tokens of the model are added) or as token ids (taken as they are). With `suffix` it is
    a text, and what comes between the two is wanted."""

    job: Job
    prompt: str | list[int]
    suffix: str | None = None


class Chat(Message, frozen=True):
    """A conversation to be rendered by the chat template. `messages` and `tools` are as the API gives them."""

    job: Job
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class Embedding(Message, frozen=True):
    """A text (special tokens of the model are added) or token ids (taken as they are) to be embedded."""

    rid: str
    prompt: str | list[int]
    priority: int = 0


class Tokenize(Message, frozen=True):
    """The token ids of a text, or of a conversation as the chat template renders it (then `prompt` is a `Chat`)."""

    rid: str
    prompt: "str | Chat"
    add_special_tokens: bool = True


class Detokenize(Message, frozen=True):
    rid: str
    token_ids: list[int]
    skip_special_tokens: bool = False


class Abort(Message, frozen=True):
    """Stop these requests and free what they hold. Unknown ids are ignored: they have ended already."""

    rids: list[str]


# ---- tokenizer worker -> scheduler ------------------------------------------------------------------------------


class TokenText(msgspec.Struct, frozen=True, array_like=True):
    """A token as the API shows it: its text, its own bytes (maybe half a character) and its log-probability."""

    token: str
    data: bytes
    logprob: float
    top: list["TokenText"] = []
    token_id: int = -1


class PromptInfo(msgspec.Struct, frozen=True, array_like=True):
    """Facts about a prompt, gathered on the way of its request; the frontend gets them with the first event.

    `text` is given when the prompt is echoed, `tokens` when their log-probabilities were asked; the first of those is
    NaN: nothing predicts it. `tail`: the last characters of a chat's prompt. `tokenized_at`: when the tokenizer worker
    sent it on, `scheduled_at`: when it first took a slot, by `time.monotonic`, which all processes of a machine share.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    text: str | None = None
    tokens: list[TokenText] | None = None
    tail: str = ""
    tokenized_at: float = 0.0
    scheduled_at: float = 0.0


class Generate(Message, frozen=True):
    """A request ready to run. `params.max_tokens` is set, and fits the context together with the prompt.

    `max_tokens_given` tells whether the client asked for that number or it is only the rest of the context.
    """

    rid: str
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens_given: bool = True
    priority: int = 0
    echo: bool = False
    stream: bool = True
    prompt: PromptInfo = PromptInfo()


class Embed(Message, frozen=True):
    """A prompt to be embedded, checked against the context."""

    rid: str
    prompt_ids: list[int]
    priority: int = 0


class FlushCache(Message, frozen=True):
    """Forget all cached prefixes. Comes from the frontend, by way of a tokenizer worker."""

    rid: str


class Reset(Message, frozen=True):
    """After every `EngineUp` the frontend sends it through each tokenizer worker, the scheduler and the detokenizer
    back to itself, and each of them forgets all requests that it has heard of. When it has come back from every worker,
    nothing that was sent before is on its way any more. `turn` tells a round from an earlier one."""

    turn: int


class Wake(Message, frozen=True):
    """A thread of the scheduler's own process has something ready for its loop."""


# ---- scheduler -> detokenizer -----------------------------------------------------------------------------------


class FinishReason(enum.StrEnum):
    """Why generation ended, in the API's words, and `abort` for a request that was told to stop."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """`matched`: the token id on EOS or a stop token, the string on a stop string, else None."""

    reason: FinishReason
    matched: int | str | None = None


class Logprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One token's log-probability (log-softmax of the raw logits) and the most likely tokens in its place."""

    token_id: int
    logprob: float
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class Admitted(msgspec.Struct, frozen=True, array_like=True):
    """What the detokenizer must know of a request; travels with the first `TokenOut` of it.

    `prompt_ids` is given when they are echoed or their log-probabilities are asked. `prompt_logprobs` has one entry
    per prompt token, None for the first, which nothing predicts.
    """

    prompt: PromptInfo
    params: SamplingParams
    stream: bool = True
    prompt_ids: list[int] | None = None
    prompt_logprobs: list[Logprob | None] | None = None


class TokenOut(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request's news of a step: new tokens, and how it ended if it did (`finish` or `failure`)."""

    rid: str
    token_ids: list[int] = []
    admitted: Admitted | None = None
    logprobs: list[Logprob] | None = None
    finish: Finish | None = None
    failure: Failure | None = None


class TokenBatch(Message, frozen=True):
    items: list[TokenOut]


# ---- to the frontend --------------------------------------------------------------------------------------------


class TextDelta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one request and their text, which may be empty. `completion_tokens` counts all generated so far."""

    rid: str
    text: str
    completion_tokens: int
    prompt: PromptInfo | None = None
    logprobs: list[TokenText] | None = None
    finish: Finish | None = None
    token_ids: list[int] = []


class TextBatch(Message, frozen=True):
    items: list[TextDelta]


class Tokenized(Message, frozen=True):
    """`tokens`: each token as the vocabulary spells it."""

    rid: str
    token_ids: list[int]
    tokens: list[str]


class Detokenized(Message, frozen=True):
    rid: str
    text: str


class Embedded(Message, frozen=True):
    """`vector`: little-endian float32, normalised if the model says so."""

    rid: str
    prompt_tokens: int
    vector: bytes


class Flushed(Message, frozen=True):
    """`pages`: how many were dropped. Those that running requests read stay."""

    rid: str
    pages: int


class Failed(Message, frozen=True):
    """The end of requests that cannot be answered."""

    rids: list[str]
    failure: Failure


class Step(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One step of the scheduler: seconds of planning, running and committing it, and its rows (embeddings: prompts)."""

    schedule_s: float
    run_s: float
    commit_s: float
    rows: int


class Counters(msgspec.Struct, array_like=True):
    """What the scheduler has done: in all, or since it last told."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    preemptions: int = 0


class Stats(Message, frozen=True):
    """How the scheduler stands; sent at most once a second, and only while there is work or when the last of it ends.
    `steps` and `news` are what came since the last one: a restart loses nothing that was told.
    Pages are in units of `page_size` tokens."""

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    steps: list[Step]
    news: Counters


class EngineUp(Message, frozen=True):
    """The launcher's word that every process of the engine can take work, at the start and after each restart. What
    the engine was doing before is lost to it.

    `info`: the limits that the scheduler told. `pids`: process ids by process name, the launcher among them."""

    info: dict[str, int | str | float] = {}
    pids: dict[str, int] = {}


class EngineDown(Message, frozen=True):
    """The launcher's word that a process died, and why. With `final` nobody starts it again."""

    reason: str
    final: bool = False


# ---- to the launcher --------------------------------------------------------------------------------------------


class Progress(Message, frozen=True):
    """One line about what a process is doing while it starts."""

    process: str
    text: str


class Ready(Message, frozen=True):
    """A process can take work. `info` is shown to the user, and the scheduler's tells the frontend its limits."""

    process: str
    info: dict[str, int | str | float] = {}


class Fatal(Message, frozen=True):
    """A process cannot go on, with words meant for the user; it exits right after."""

    process: str
    message: str


Question = Embedding | Tokenize | Detokenize | FlushCache
Request = Chat | Completion | Question
ToTokenizer = Request | Abort | Reset
ToScheduler = Generate | Embed | FlushCache | Abort | Reset | Wake
ToDetokenizer = TokenBatch | Reset
Answer = Tokenized | Detokenized | Embedded | Flushed
ToFrontend = TextBatch | Answer | Failed | Stats | Reset | EngineUp | EngineDown
ToLauncher = Progress | Ready | Fatal


def rids_of(request: Request) -> list[str]:
    """The ids that a request is known by: one for each choice of a prompt."""
    return request.job.rids if isinstance(request, Chat | Completion) else [request.rid]
