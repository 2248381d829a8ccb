"""What rank 0 and the other tensor-parallel ranks say to each other; the channel is in `ipc/channel.py`.

A rank says `Hello`, rank 0 answers `Welcome` or `Refused` once it has heard them all, and from then on sends every plan
before it executes the same. Nothing goes back: the ranks meet in the collectives.
"""

from ramet.ipc.messages import Message
from ramet.ipc.step import StepPlan


class Hello(Message, frozen=True):
    """`facts` must be the same on all ranks: versions, settings, and the model's checksums, by their names."""

    rank: int
    facts: dict[str, str]


class Welcome(Message, frozen=True):
    """`store`: where the ranks' collectives find each other, a path or HOST:PORT."""

    store: str


class Refused(Message, frozen=True):
    """The rank cannot take part, with words for the user."""

    message: str


class Ping(Message, frozen=True):
    """Sending it shows whether the rank is still there."""


ToRank = Welcome | Refused | StepPlan | Ping
