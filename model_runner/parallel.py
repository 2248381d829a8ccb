"""`TpGroup`: the ranks that share one model, and the collectives between them.

Layers are written against it from the start; a group of one does nothing.
"""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class TpGroup:
    """This process is `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def shard(self, total: int, what: str) -> range:
        """The slice of `total` equal units that this rank owns. Raises ValueError if they cannot be split evenly."""
        if total % self.size:
            raise ValueError(f"{what} ({total}) cannot be divided over {self.size} tensor-parallel ranks")
        per_rank = total // self.size
        return range(self.rank * per_rank, (self.rank + 1) * per_rank)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        if self.size == 1:
            return tensor
        raise NotImplementedError("tensor parallelism over several ranks is not built yet")

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate over ranks along the last dimension."""
        if self.size == 1:
            return tensor
        raise NotImplementedError("tensor parallelism over several ranks is not built yet")
