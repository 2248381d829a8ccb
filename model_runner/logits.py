"""Logits processors: what changes one request's logits before a token is chosen.

The order, the same for every request:

0. grammar: tokens that it does not allow next are banned (`apply_masks`, for all rows at once).
1. logit bias: added; -100 bans the token.
2. min_tokens: the tokens that would end the request are banned until so many are generated.
3. repetition penalty, over prompt and generated tokens: positive logits divided, negative ones multiplied.
4. frequency penalty, times the count among generated tokens; presence penalty, once if the count is not zero.

Temperature and the filters follow in `sampler.py`. Greedy requests go through the same.
"""

import numpy as np
import torch
from torch import Tensor

from ramet.ipc.step import Admission, TokenMasks

BAN_BIAS = -100.0


def apply_masks(logits: Tensor, masks: TokenMasks) -> None:
    """Ban in place what the masks do not allow. logits: [R, vocab_size]."""
    bits = np.unpackbits(~masks.bits.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    banned = send(torch.from_numpy(bits.view(np.bool_)), logits.device)
    for row, line in zip(masks.rows, banned, strict=True):
        logits[row].masked_fill_(line, float("-inf"))


def send(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, which is not waited for: from other than pinned memory CUDA would wait."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


class LogitsProcessor:
    """The processors of one request, and the token counts they need."""

    def __init__(self, admission: Admission, vocab_size: int, device: torch.device) -> None:
        self._params = admission.params
        self._num_generated = len(admission.token_ids) - admission.prompt_len
        bias = admission.params.logit_bias
        self._bias_ids = send(torch.tensor(list(bias), dtype=torch.long), device)
        self._bias = send(torch.tensor([float("-inf") if b <= BAN_BIAS else b for b in bias.values()]), device)
        self._banned = send(torch.tensor([i for i in admission.eos_ids if i < vocab_size], dtype=torch.long), device)
        self._counts: Tensor | None = None
        if admission.params.penalised:
            tokens = torch.tensor(admission.token_ids, dtype=torch.long)
            generated = torch.bincount(tokens[admission.prompt_len :], minlength=vocab_size)
            self._counts = send(generated.float(), device)
            self._seen = send(torch.bincount(tokens, minlength=vocab_size).bool(), device)

    def apply(self, logits: Tensor) -> None:
        """Change one row of logits [vocab_size] in place."""
        params = self._params
        if params.logit_bias:
            logits[self._bias_ids] += self._bias
        if self._num_generated < params.min_tokens:
            logits[self._banned] = float("-inf")
        if self._counts is None:
            return
        if params.repetition_penalty != 1.0:
            factor = params.repetition_penalty
            penalised = torch.where(logits > 0, logits / factor, logits * factor)
            torch.where(self._seen, penalised, logits, out=logits)
        if params.frequency_penalty:
            logits -= params.frequency_penalty * self._counts
        if params.presence_penalty:
            logits -= params.presence_penalty * (self._counts > 0)

    def observe(self, token: Tensor) -> None:
        """The request's next token was chosen: [1] int64, which the host need not know."""
        self._num_generated += 1
        if self._counts is not None:
            self._counts.index_add_(0, token, torch.ones_like(self._counts[:1]))
            self._seen.index_fill_(0, token, True)
