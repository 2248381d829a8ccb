"""Which piece of which checkpoint tensor fills which piece of a parameter.

Layers describe themselves as `WeightPart`s under the names that Hugging Face checkpoints use; a `WeightSource` reads
them from a file format. A part names only what this rank needs, so nothing is read twice and no parameter is ever
held twice in memory. Every part must be filled and every tensor used, or loading fails with the names.
"""

import abc
import dataclasses
import re
from collections.abc import Callable, Iterable, Set

import torch
from torch import Tensor

from ramet.model_runner.weights.errors import WeightsError

Progress = Callable[[int, int], None]

# Tensors that some checkpoints carry but that are computed here, not read.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)$")
_NAMES_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class WeightPart:
    """`target` (a view of a parameter) is filled from tensor `name`, whose full shape is `shape`.

    `dim` and `span`: only `span` along `dim` of the tensor is read; dim None is the whole. What is read is reshaped
    to the target's shape, or broadcast to it, after `offset` is added.
    """

    name: str
    target: Tensor
    shape: tuple[int, ...]
    dim: int | None = None
    span: range = range(0)
    offset: float = 0.0

    @property
    def index(self) -> tuple[slice, ...]:
        some = slice(self.span.start, self.span.stop)
        return tuple(some if dim == self.dim else slice(None) for dim in range(len(self.shape)))


class WeightSource(abc.ABC):
    """A checkpoint, whatever its format, under Hugging Face names."""

    path: object = "the checkpoint"  # where it lies, for the words of errors

    @abc.abstractmethod
    def names(self, wanted: Set[str] = frozenset()) -> Set[str]:
        """All tensors it holds: by names of `wanted` where they are one of those, else as the format calls them."""

    @abc.abstractmethod
    def shape(self, part: WeightPart) -> tuple[int, ...]:
        """The full shape of the part's tensor."""

    @abc.abstractmethod
    def read(self, part: WeightPart) -> Tensor:
        """The piece that `part.index` selects, in the checkpoint's own precision."""

    def close(self) -> None:  # noqa: B027 - most sources hold nothing open
        """Release files."""


def fill(parts: Iterable[WeightPart], source: WeightSource, unused: Set[str], progress: Progress) -> None:
    """Fill every part from `source`. `unused`: tensors that may be in the source although no part wants them.

    Raises WeightsError naming the tensors that are missing, left over, of another shape, or not finite.
    """
    parts = list(parts)
    wanted = {part.name for part in parts}
    present = source.names(wanted | unused)
    if missing := wanted - present:
        raise WeightsError(f"{source.path} lacks {_listed(missing)}")
    leftover = {name for name in present - wanted - unused if not _COMPUTED.search(name)}
    if leftover:
        raise WeightsError(f"the model has no place for {_listed(leftover)} of {source.path}")
    for done, part in enumerate(parts):
        found = source.shape(part)
        if found != part.shape:
            raise WeightsError(f"{part.name} has shape {list(found)} in {source.path}, not {list(part.shape)}")
        progress(done, len(parts))
        tensor = source.read(part)
        # A sum takes a fraction of the time of looking at each number.
        if not tensor.sum(dtype=torch.float32).isfinite():
            raise WeightsError(f"{part.name} in {source.path} has numbers that are infinite or none (NaN)")
        if part.offset:
            tensor = tensor.float() + part.offset
        part.target.copy_(tensor)
    progress(len(parts), len(parts))


def _listed(names: Set[str]) -> str:
    shown = sorted(names)[:_NAMES_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
