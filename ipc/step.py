"""`StepPlan` and `StepResult`: what the scheduler asks of the model runner for one step, and what comes back.

A plan is plain data, so that it can be sent to other ranks and replayed in tests. It carries only what changed: the
runner keeps the state of each request (pages, sampling, token history) in a *slot* from its `Admission` until the
slot is listed in `released`.

Invariants: a slot appears at most once in a plan; rows come decode first (one token each), then prefill chunks;
position p of a request lives in page `p // page_size` of its slot's page table, at offset `p % page_size`.
"""

from typing import NamedTuple

import msgspec
import numpy as np

from ramet.ipc.errors import Failure
from ramet.ipc.messages import Logprob, Message
from ramet.ipc.sampling import SamplingParams

# In place of an input token that the step before samples, whose result has not been read yet: the runner takes the
# token that it chose last for the row's slot.
UNKNOWN_TOKEN = -1


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """A request takes a slot with this step (first time, or again after a preemption).

    `token_ids`: all tokens known of it, prompt then generated; none unless `params.reads_tokens`. `eos_ids`: tokens
    that end it, banned until `params.min_tokens` are generated (empty with `ignore_eos`; stop tokens included).
    """

    slot: int
    token_ids: list[int]
    prompt_len: int
    params: SamplingParams
    eos_ids: list[int]


class PageGrant(msgspec.Struct, frozen=True, array_like=True):
    """`pages` become entries `first`, `first + 1`, … of the slot's page table."""

    slot: int
    first: int
    pages: list[int]


class Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request's share of a step: compute positions `start` to `start + length - 1`.

    `sample`: choose the next token from the last position's logits. `prompt_logprobs`: also return the
    log-probabilities of the prompt tokens that these positions predict.
    """

    slot: int
    start: int
    length: int
    sample: bool
    prompt_logprobs: bool = False


class StepPlan(Message, frozen=True):
    """One step. `token_ids` holds the input tokens of all rows, one row after the other. Plans are executed in their
    order, and may be made while the one before runs: pages and slots that it still uses may be given anew here."""

    step: int
    rows: list[Row]
    token_ids: list[int]
    admissions: list[Admission] = msgspec.field(default_factory=list)
    grants: list[PageGrant] = msgspec.field(default_factory=list)
    released: list[int] = msgspec.field(default_factory=list)


class RowResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one row gave: `token_id` if it sampled, and the log-probabilities that were asked.

    `error` is set when this row alone failed (for example NaN logits).
    """

    token_id: int | None = None
    logprob: Logprob | None = None
    prompt_logprobs: list[Logprob] | None = None
    error: Failure | None = None


class TokenMasks(NamedTuple):
    """Which tokens the grammars allow next. `rows`: indices among the plan's sampled rows. `bits`: uint32 [rows,
    ceil(vocab / 32)]; token t is bit t % 32 of word t // 32.

    Not in the plan: only rank 0 samples under a grammar, and they are computed while the model runs."""

    rows: list[int]
    bits: np.ndarray


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """Results in the order of the plan's rows."""

    step: int
    rows: list[RowResult]
