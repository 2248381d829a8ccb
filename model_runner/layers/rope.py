"""Rotary position embedding (Su et al., 2021): frequencies from a Hugging Face config, and their table.

Scaled variants use the formulas in `transformers`. Those that depend on the length of the sequence are fixed once for
the context length served: keys in the cache are already rotated, and requests of all lengths share a step.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ramet.model_runner.weights.errors import WeightsError


@dataclasses.dataclass(frozen=True)
class RopeFrequencies:
    """`inverse`: [head_dim / 2] float32, radians per position. cos and sin are multiplied by `scale`."""

    inverse: Tensor
    scale: float = 1.0

    def divided_by(self, factors: Tensor) -> "RopeFrequencies":
        """With a factor per frequency, as GGUF files carry them in `rope_freqs.weight`."""
        return RopeFrequencies(self.inverse / factors, self.scale)

    def table(self, length: int, device: torch.device) -> Tensor:
        """[length, 2, head_dim] float32: cos and signed sin of each position, for `rotate`."""
        positions = torch.arange(length, dtype=torch.float32, device=self.inverse.device)
        angles = positions[:, None] * self.inverse
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], dim=1)
        return table.to(device)


def rope_frequencies(config: Any, context_length: int, layer_type: str | None = None) -> RopeFrequencies:
    """The frequencies for `config.rope_parameters`, or for those of `layer_type` where layers differ. `config` is a
    `ModelConfig`.

    dynamic and longrope are taken for a sequence of `context_length`. Raises WeightsError for a kind not known.
    """
    parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    kind = parameters["rope_type"]
    if kind != "proportional" and parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise WeightsError(f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported, only 1.0 is")
    if kind == "default":
        return plain_frequencies(parameters["rope_theta"], config)
    # Imported when needed: most models have a plain rope, and half a second is a long time at start.
    from transformers import PretrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS as KINDS

    if kind not in KINDS:
        raise WeightsError(f"rope type {kind!r} is not supported; known are default, {', '.join(KINDS)}")
    # The functions want methods of this class, none of any model's own.
    full, where = PretrainedConfig(**vars(config)), {"layer_type": layer_type} if layer_type else {}
    inverse, scale = KINDS[kind](full, torch.device("cpu"), seq_len=context_length, **where)
    return RopeFrequencies(inverse, scale)


def plain_frequencies(theta: float, config: Any) -> RopeFrequencies:
    """theta ** (-2i / head_dim)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return RopeFrequencies(1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)))


def rotate(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """heads [N, heads, dim], cos and signed_sin [N, 1, dim]. Pairs are (i, i + dim / 2), as in Hugging Face models."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), signed_sin)
