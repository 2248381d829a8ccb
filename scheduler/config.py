"""What the scheduler core needs to know, resolved by the launcher and frozen."""

import enum

import msgspec


class Policy(enum.StrEnum):
    """Order of waiting requests of equal priority: by arrival, or longest cached prefix first."""

    FCFS = "fcfs"
    LPM = "lpm"


class TpConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One of `size` tensor-parallel ranks. `address`: where rank 0 awaits the others, `ipc://PATH` or `tcp://HOST:PORT`.

    With ranks on several machines there is a `host`, that of rank 0, and a `secret` that all share. `meet_timeout_s`:
    how long ranks wait for each other to come; `setup_timeout_s`: then for each other's weights."""

    rank: int = 0
    size: int = 1
    address: str = ""
    host: str = ""
    secret: str = ""
    meet_timeout_s: float = 90.0
    setup_timeout_s: float = 900.0


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`max_step_tokens` bounds the tokens computed in one step, and `max_prefill_tokens` the share of prompts in a
    step in which other requests are decoding, so that streams do not freeze. `eos_ids` end any request.
    `steps_ahead`: so many steps are launched before the result of the one before them is read.
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
    tp: TpConfig = TpConfig()
    steps_ahead: int = 0
