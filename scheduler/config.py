"""What the scheduler core needs to know, resolved by the launcher and frozen."""

import enum

import msgspec


class Policy(enum.StrEnum):
    """Order of waiting requests of equal priority: by arrival, or longest cached prefix first."""

    FCFS = "fcfs"
    LPM = "lpm"


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`max_step_tokens` bounds the tokens computed in one step, and `max_prefill_tokens` the share of prompts in a
    step in which other requests are decoding, so that streams do not freeze. `eos_ids` end any request.
    Grammars are compiled for the tokenizer.json in `tokenizer_dir`."""

    page_size: int
    max_running: int
    max_step_tokens: int
    max_prefill_tokens: int
    context_length: int
    eos_ids: tuple[int, ...]
    tokenizer_dir: str = ""
    policy: Policy = Policy.FCFS
    prefix_cache: bool = True
