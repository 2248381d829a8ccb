"""The sampler: logits of the rows that want a token, to token ids and log-probabilities.

The pipeline, in order, for a batch of rows [R, vocab]:

1. log-probabilities, where asked: log-softmax of the raw logits.
2. tokens that a grammar does not allow are banned (`logits.py`).
3. logits processors (`logits.py`): bias, bans, penalties.
4. greedy rows: the largest logit; the lowest id on a tie.
5. other rows: divide by the temperature; keep the top k; of what remains renormalised, keep the smallest set of
   probability top_p; keep what has at least min_p of the best one's probability. Ties at a border are kept.
6. add Gumbel noise drawn from (seed, position, token id) and take the largest: an exact draw from the softmax.

A row whose choice is NaN, or has no token left, is an error of that row alone. Nothing here waits for the device but
`Sampled.results`.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.messages import Logprob
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import RowResult, TokenMasks
from ramet.kernels.cpu.build import KernelUnavailable
from ramet.kernels.cpu.sampling import ChooseKernel
from ramet.model_runner.logits import LogitsProcessor, apply_masks, send
from ramet.model_runner.noise import MASK64, keyed_gumbel, row_keys

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SampledRow:
    """`processor` is None where nothing changes the logits."""

    params: SamplingParams
    processor: LogitsProcessor | None


class Choices(NamedTuple):
    """How each of R rows is chosen, [R] on the device, keys [R, 2] int32. scales: 1 / temperature, 0 for greedy rows,
    which have no filters and no noise; float32. A top_p of 1, a log_min_p of -inf and a top_k of 0 filter nothing."""

    scales: Tensor
    top_p: Tensor
    log_min_p: Tensor
    top_k: Tensor
    keys: Tensor


# The same of one request on the host, where it takes part in whole batches without a loop.
CHOOSING = np.dtype([("scale", "f4"), ("top_p", "f4"), ("log_min_p", "f4"), ("top_k", "i8"), ("seed", "u8")])

# From logits [R, vocab], which may be overwritten, to the chosen tokens [R] int64 and what they won with [R]. The last
# argument tells whether any row filters.
Chooser = Callable[[Tensor, Choices, bool], tuple[Tensor, Tensor]]


def choosing(params: SamplingParams) -> tuple[float, float, float, int, int]:
    """An entry of type `CHOOSING`."""
    seed = (params.seed or 0) & MASK64
    if params.greedy:
        return 0.0, 1.0, -math.inf, 0, seed
    log_min_p = math.log(params.min_p) if params.min_p else -math.inf
    return 1 / params.temperature, params.top_p, log_min_p, max(params.top_k, 0), seed


def choice_arrays(rows: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    """`Choices` as numpy arrays, of rows [R] of type `CHOOSING` that draw the tokens at `positions` [R]."""
    plain = {name: rows[name].copy() for name in ("top_p", "log_min_p", "top_k")}
    return {"scales": rows["scale"].copy(), **plain, "keys": row_keys(rows["seed"], positions)}


def make_chooser(device: torch.device) -> Chooser:
    """The C kernel on a CPU, where it can be built, and Triton kernels on CUDA; else plain torch."""
    if device.type == "cuda":
        return choose_on_cuda
    try:
        kernel = ChooseKernel()
    except KernelUnavailable as error:
        logger.warning("sampling with plain torch, which is slower: %s", error)
        return choose_plainly
    return lambda logits, choices, filtered: kernel(logits, *choices)


class Sampled:
    """Chosen tokens [R] and what they won with [R], and copies of them on their way to the host; `ranked` are the
    log-probabilities of the rows `wanted`."""

    def __init__(
        self, tokens: Tensor, best: Tensor, wanted: Sequence[int] = (), ranked: "Ranked | None" = None
    ) -> None:
        self.tokens = tokens
        self._tokens, self._best = _to_host(tokens), _to_host(best)
        self._wanted, self._ranked = wanted, ranked

    def results(self) -> list[RowResult]:
        """One per row; the device has been waited for."""
        results = [_result(*pair) for pair in zip(self._tokens.tolist(), self._best.tolist(), strict=True)]
        if self._ranked is not None:
            for i, logprob in zip(self._wanted, self._ranked.logprobs(), strict=True):
                if results[i].error is None:
                    results[i] = RowResult(results[i].token_id, logprob)
        return results


def sample(
    logits: Tensor, rows: list[SampledRow], choices: Choices, choose: Chooser, masks: TokenMasks | None = None
) -> Sampled:
    """logits: [R, vocab] float32, overwritten."""
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if wanted:
        at = send(torch.tensor(wanted), logits.device)
        logprobs = logits.index_select(0, at).log_softmax(dim=-1)
    if masks is not None:
        apply_masks(logits, masks)
    for i, row in enumerate(rows):
        if row.processor is not None:
            row.processor.apply(logits[i])
    tokens, best = choose(logits, choices, any(_filters(row.params) for row in rows))
    for i, row in enumerate(rows):
        if row.processor is not None:
            row.processor.observe(tokens[i : i + 1])
    if not wanted:
        return Sampled(tokens, best)
    counts = [rows[i].params.logprobs or 0 for i in wanted]
    return Sampled(tokens, best, wanted, Ranked(logprobs, tokens.index_select(0, at), counts))


def is_plain(row: SampledRow) -> bool:
    """Whether nothing but scale and noise comes between the row's logits and its token, and no more is asked of it."""
    params = row.params
    return row.processor is None and params.grammar is None and params.logprobs is None and not _filters(params)


def choose_plainly(logits: Tensor, choices: Choices, filtered: bool) -> tuple[Tensor, Tensor]:
    """Steps 4 to 6 in plain torch, for any device."""
    random = choices.scales[:, None] > 0
    scaled = torch.where(random, logits * choices.scales[:, None], logits)
    if filtered:
        scaled = scaled.masked_fill(random & (scaled < _border(scaled, choices)), -math.inf)
    noise = keyed_gumbel(choices.keys, logits.shape[1])
    best, tokens = torch.where(random, scaled + noise, scaled).max(dim=-1)
    return tokens, best


def _border(scaled: Tensor, choices: Choices) -> Tensor:
    """[R, 1]: the smallest of the scaled logits [R, vocab] that top-k, top-p of what is left, and min-p keep."""
    ordered = scaled.sort(dim=-1, descending=True).values
    top_p, vocab = choices.top_p[:, None], scaled.shape[1]
    last = torch.where((choices.top_k > 0) & (choices.top_k < vocab), choices.top_k, vocab)[:, None] - 1
    border = ordered.gather(1, last)
    mass = ordered.masked_fill(ordered < border, -math.inf).softmax(dim=-1).cumsum(dim=-1)
    reached = (mass < top_p).sum(dim=-1, keepdim=True)  # how many come before the one that reaches it
    border = torch.where(top_p < 1, ordered.gather(1, reached.minimum(last)), border)
    return border.maximum(ordered[:, :1] + choices.log_min_p[:, None])


def choose_on_cuda(logits: Tensor, choices: Choices, filtered: bool) -> tuple[Tensor, Tensor]:
    """The same in Triton kernels."""
    from ramet.kernels.triton.sampling import choose  # a server on a CPU has no use for triton

    # Sorting costs more than all the rest.
    borders = _border(logits * choices.scales[:, None], choices) if filtered else None
    return choose(logits, choices.scales, choices.keys, borders)


class Ranked:
    """For rows of logprobs [R, vocab]: the value of a token [R] and the `counts[i]` most likely ones, on their way to
    the host."""

    def __init__(self, logprobs: Tensor, tokens: Tensor, counts: list[int]) -> None:
        # A row without a choice may name what is no token.
        at = tokens.clamp(0, logprobs.shape[1] - 1)[:, None]
        top = logprobs.topk(max(counts), dim=-1)
        self._counts = counts
        self._parts = [_to_host(t) for t in (tokens, logprobs.gather(1, at).squeeze(1), top.indices, top.values)]

    def logprobs(self) -> list[Logprob]:
        """The device has been waited for."""
        rows = zip(self._counts, *(part.tolist() for part in self._parts), strict=True)
        return [
            Logprob(token, value, ids[:count], tops[:count]) if count else Logprob(token, value)
            for count, token, value, ids, tops in rows
        ]


def _filters(params: SamplingParams) -> bool:
    return not params.greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


def _to_host(tensor: Tensor) -> Tensor:
    """Into pinned memory, which is filled once the device has come this far."""
    return tensor.to("cpu", non_blocking=True)


def _result(token: int, best: float) -> RowResult:
    if best != best:
        return RowResult(error=Failure(FailureKind.INTERNAL, "the model gave NaN logits for this request"))
    if best == float("-inf"):
        words = "no token is left to choose: all are banned, by logit_bias, min_tokens, ignore_eos or a grammar"
        return RowResult(error=Failure(FailureKind.INVALID_REQUEST, words))
    return RowResult(token)
