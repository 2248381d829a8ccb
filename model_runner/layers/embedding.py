"""The token embedding and the LM head, both split by vocabulary over the ranks; they may share one matrix.

Ranks hold equally many rows, so that one collective gathers the logits; where the vocabulary does not divide, the last
rows stand for no token, and their logits are cut off."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramet.model_runner.layers.linear import empty_parameter, linear, pack
from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.weights.mapping import WeightPart


class VocabMatrix(nn.Module):
    """[vocab, hidden], of which this rank holds the rows in `span`, and then padding."""

    def __init__(self, vocab_size: int, hidden_size: int, group: TpGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = (vocab_size, hidden_size)
        self.group = group
        self.span = group.padded_shard(vocab_size)
        self.weight = empty_parameter(-(-vocab_size // group.size), hidden_size, dtype=dtype)
        self._packed: Tensor | None = None

    def embed(self, token_ids: Tensor) -> Tensor:
        """[N] int64 -> [N, hidden]."""
        if self.group.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.span.start
        absent = (local < 0) | (local >= len(self.span))
        rows = F.embedding(local.masked_fill(absent, 0), self.weight)
        return self.group.all_reduce(rows.masked_fill(absent[:, None], 0))

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab] float32, which on CUDA no half type has rounded: bfloat16 near 25 has steps of an
        eighth, and the best tokens would often tie."""
        if hidden.is_cuda and hidden.dtype.itemsize == 2:
            local = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
        else:
            local = linear(hidden, self.weight if self._packed is None else self._packed)
        return self.group.all_gather(local)[:, : self.shape[0]].float().contiguous()

    def pack(self) -> None:
        """For `logits`; the plain weight stays, since rows of it may be embedded."""
        self._packed = pack(self.weight)

    def weight_parts(self, prefix: str) -> Iterator[WeightPart]:
        yield WeightPart(f"{prefix}.weight", self.weight[: len(self.span)], self.shape, dim=0, span=self.span)
