"""The interface between the runner and any model, native or fallback."""

import abc

from torch import Tensor, nn

from ramet.model_runner.context import ForwardContext
from ramet.model_runner.kv_pool import KVSpec


class CausalLM(nn.Module, abc.ABC):
    """A decoder that writes its keys and values through the context. `kv_specs` has one entry per attention layer."""

    kv_specs: list[KVSpec]
    vocab_size: int
    capturable: bool = True  # nothing in it waits for the device

    @abc.abstractmethod
    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """token_ids [N] int64 -> final normalised hidden states [N, hidden]."""

    @abc.abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden] -> [R, vocab_size] float32 logits, softcap applied where the model has one."""
