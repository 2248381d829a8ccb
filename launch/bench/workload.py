"""What is asked of a server or an engine: lengths, prompts and arrivals, all drawn from one seed.

A prompt is a list of units: token ids, or common words, which nearly all vocabularies hold as one token each.
"""

import functools
import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from ramet.launch import server_args

flag = functools.partial(server_args.flag, "benchmark")
WORDS = "the of and to in is was for that on with as at by from are this have not had but all one were".split()  # noqa: SIM905


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The flags that `ramet bench serve` and `ramet bench offline` share."""

    num_requests: Annotated[int, flag("requests to measure", ge=1)] = 64
    input_len: Annotated[str, flag("tokens of a prompt: a number, or LOW-HIGH for any between")] = "128"
    output_len: Annotated[str, flag("most tokens of an answer, likewise")] = "64"
    ignore_eos: Annotated[bool, flag("let each answer have all its tokens (not every server can)")] = False
    shared_prefix_len: Annotated[int, flag("tokens before those of --input-len that requests share", ge=0)] = 0
    num_prefixes: Annotated[int, flag("different shared prefixes, taken in turn", ge=1)] = 1
    temperature: Annotated[float, flag("sampling temperature (0)", ge=0)] = 0.0
    seed: Annotated[int, flag("seed of lengths, prompts, arrivals and sampling")] = 0
    json: Annotated[str | None, flag("write the results to this file")] = None

    def __post_init__(self) -> None:
        bounds("input_len", self.input_len)
        bounds("output_len", self.output_len)


def bounds(name: str, text: str) -> tuple[int, int]:
    """`64-256` is (64, 256), `64` is (64, 64). Raises ValueError."""
    low, dash, high = text.partition("-")
    if not (low.isdecimal() and (high.isdecimal() or not dash) and 1 <= int(low) <= int(high or low)):
        raise ValueError(f"{name} {text!r} is neither a number from 1 up nor a range LOW-HIGH of them")
    return int(low), int(high or low)


class Scale(NamedTuple):
    """A prompt of n units has `overhead + n * per_unit` tokens: a chat template and special tokens add the first."""

    overhead: float = 0.0
    per_unit: float = 1.0


class Item(NamedTuple):
    """One request: its prompt, the tokens that it should have, and the most tokens of the answer."""

    units: list[Any]
    input_len: int
    output_len: int


def draw_items(load: Workload, vocabulary: Sequence[Any], scale: Scale, name: str, count: int) -> list[Item]:
    """`count` requests. Another name gives other ones, with other prefixes."""
    rng = random.Random(f"{load.seed} {name}")
    shared = round(load.shared_prefix_len / scale.per_unit)
    prefixes = [rng.choices(vocabulary, k=shared) for _ in range(load.num_prefixes)]
    items = []
    for i in range(count):
        input_len = load.shared_prefix_len + rng.randint(*bounds("input_len", load.input_len))
        own = max(1, round((input_len - scale.overhead) / scale.per_unit) - shared)
        units = prefixes[i % len(prefixes)] + rng.choices(vocabulary, k=own)
        items.append(Item(units, input_len, rng.randint(*bounds("output_len", load.output_len))))
    return items


def arrival_times(seed: int, rate: float) -> Iterator[float]:
    """Seconds from the start of a Poisson process with `rate` arrivals per second."""
    rng, at_s = random.Random(f"{seed} arrivals"), 0.0
    while True:
        yield at_s
        at_s += rng.expovariate(rate)
