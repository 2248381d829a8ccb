"""Random weights from a config alone, to measure speed or test without a checkpoint."""

import torch

from ramet.model_runner.weights.mapping import Progress, WeightPart

_MATRIX_STD = 0.02


def fill_randomly(parts: list[WeightPart], seed: int, progress: Progress) -> None:
    """Matrices: normal with a small deviation, so that activations neither die nor overflow; norms 1; biases 0.

    The same seed gives the same weights on the same kind of device.
    """
    for done, part in enumerate(parts):
        progress(done, len(parts))
        target = part.target
        if len(part.shape) >= 2:
            generator = torch.Generator(target.device).manual_seed(seed * 1_000_003 + done)
            target.normal_(0.0, _MATRIX_STD, generator=generator)
        else:
            # A norm's weight is applied as 1 + weight where an offset is folded in.
            target.fill_(0.0 if part.name.endswith("bias") else 1.0)
    progress(len(parts), len(parts))
