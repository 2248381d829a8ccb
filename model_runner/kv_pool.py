"""The paged KV pool: one pair of tensors per layer, `[page, page_size, kv_heads, head_dim]`.

Owns the memory; does not know which page belongs to whom (`scheduler/page_allocator.py` does). Page `num_pages` is a
dummy that padding rows may write to.
"""

import dataclasses

import torch
from torch import Tensor

from ramet.kernels.cpu import huge_pages


@dataclasses.dataclass(frozen=True)
class KVSpec:
    """Shape of one layer's cache entry for one token. `key_dim` and `value_dim` may differ (some architectures)."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class KVPool:
    """Keys and values of all cached tokens, by layer.

    keys[layer]: [num_pages + 1, page_size, num_kv_heads, key_dim]; values[layer] likewise with value_dim.
    """

    def __init__(
        self, specs: list[KVSpec], num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size

        def allocate(heads: int, dim: int) -> Tensor:
            """Zeroed: a NaN left in what is not written yet would survive a masked softmax (0 * NaN)."""
            shape = (num_pages + 1, page_size, heads, dim)
            if device.type == "cpu":  # only mapped when it is written, so that a large pool costs what is used of it
                return huge_pages.zeros(shape, dtype)
            return torch.zeros(shape, dtype=dtype, device=device)

        self.keys = [allocate(spec.num_kv_heads, spec.key_dim) for spec in specs]
        self.values = [allocate(spec.num_kv_heads, spec.value_dim) for spec in specs]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def store(self, layer: int, slot_mapping: Tensor, key: Tensor, value: Tensor) -> None:
        """Write key [N, kv_heads, key_dim] and value [N, kv_heads, value_dim] of N tokens.

        slot_mapping: [N] int64, `page * page_size + offset` of each token.
        """
        keys, values = self.keys[layer], self.values[layer]
        keys.flatten(0, 1).index_copy_(0, slot_mapping, key.to(keys.dtype))
        values.flatten(0, 1).index_copy_(0, slot_mapping, value.to(values.dtype))
