"""The sampler: logits of the rows that want a token, to token ids and log-probabilities.

The pipeline, in order, for a batch of rows [R, vocab]:

1. log-probabilities, where asked: log-softmax of the raw logits.
2. tokens that a grammar does not allow are banned (`logits.py`).
3. logits processors (`logits.py`): bias, bans, penalties.
4. greedy rows: the largest logit; the lowest id on a tie.
5. other rows: divide by the temperature; keep the top k; of what remains renormalised, keep the smallest set of
   probability top_p; keep what has at least min_p of the best one's probability. Ties at a border are kept.
6. add Gumbel noise drawn from (seed, position, token id) and take the largest: an exact draw from the softmax.

A row whose choice is NaN, or has no token left, is an error of that row alone.
"""

import dataclasses
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.messages import Logprob
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import RowResult, TokenMasks
from ramet.kernels.cpu.build import KernelUnavailable
from ramet.kernels.cpu.sampling import ChooseKernel
from ramet.model_runner.logits import LogitsProcessor, apply_masks
from ramet.model_runner.noise import gumbel, row_keys

log = logging.getLogger(__name__)

# Sorting a whole vocabulary for top_p is slow; the first so many nearly always hold the mass that is wanted.
_TOP_P_FIRST_LOOK = 512


@dataclasses.dataclass(frozen=True)
class SampledRow:
    """`position` is that of the token to be chosen. `processor` is None where nothing changes the logits."""

    params: SamplingParams
    position: int
    processor: LogitsProcessor | None


# From logits [R, vocab], which may be overwritten, to the chosen tokens [R] int64 and what they won with [R].
Chooser = Callable[[Tensor, list[SampledRow]], tuple[Tensor, Tensor]]


def make_chooser(device: torch.device) -> Chooser:
    """The C kernel on a CPU, where it can be built; else plain torch."""
    if device.type == "cpu":
        try:
            return KernelChooser()
        except KernelUnavailable as error:
            log.warning("sampling with plain torch, which is slower: %s", error)
    return choose_plainly


def sample(logits: Tensor, rows: list[SampledRow], choose: Chooser, masks: TokenMasks | None = None) -> list[RowResult]:
    """logits: [R, vocab] float32, overwritten. One result per row."""
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    logprobs = logits[wanted].log_softmax(dim=-1) if wanted else None
    if masks is not None:
        apply_masks(logits, masks)
    for i, row in enumerate(rows):
        if row.processor is not None:
            row.processor.apply(logits[i])
    tokens, best = choose(logits, rows)
    results = [_result(row, *pair) for row, *pair in zip(rows, tokens.tolist(), best.tolist(), strict=True)]
    if logprobs is not None:
        _attach_logprobs(results, rows, wanted, logprobs)
    return results


def choose_plainly(logits: Tensor, rows: list[SampledRow]) -> tuple[Tensor, Tensor]:
    """Steps 4 to 6 for any device."""
    for i, row in enumerate(rows):
        if not row.params.greedy:
            logits[i] *= 1 / row.params.temperature
            _filter(logits[i], row.params)
    random = [i for i, row in enumerate(rows) if not row.params.greedy]
    if random:
        seeds, positions = [rows[i].params.seed or 0 for i in random], [rows[i].position for i in random]
        logits[random] += gumbel(seeds, positions, logits.shape[1], logits.device)
    best, tokens = logits.max(dim=-1)
    return tokens, best


class KernelChooser:
    """The same in one pass over the logits; raises KernelUnavailable where it cannot be built."""

    def __init__(self) -> None:
        self._kernel = ChooseKernel()

    def __call__(self, logits: Tensor, rows: list[SampledRow]) -> tuple[Tensor, Tensor]:
        params = [row.params for row in rows]
        return self._kernel(
            logits,
            torch.tensor([0.0 if p.greedy else 1 / p.temperature for p in params]),
            torch.tensor([p.top_p for p in params]),
            torch.tensor([math.log(p.min_p) if p.min_p else float("-inf") for p in params]),
            torch.tensor([max(p.top_k, 0) for p in params]),
            row_keys([p.seed or 0 for p in params], [row.position for row in rows]),
        )


def rank_tokens(logprobs: Tensor, tokens: list[int], counts: list[int]) -> list[Logprob]:
    """For rows of logprobs [R, vocab]: the value of a token and the `counts[i]` most likely ones."""
    values = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None]).squeeze(1).tolist()
    most = max(counts)
    if most == 0:
        return [Logprob(token, value) for token, value in zip(tokens, values, strict=True)]
    top = logprobs.topk(most, dim=-1)
    ids, tops = top.indices.tolist(), top.values.tolist()
    return [
        Logprob(token, value, ids[i][: counts[i]], tops[i][: counts[i]])
        for i, (token, value) in enumerate(zip(tokens, values, strict=True))
    ]


def _result(row: SampledRow, token: int, best: float) -> RowResult:
    if best != best:
        return RowResult(error=Failure(FailureKind.INTERNAL, "the model gave NaN logits for this request"))
    if best == float("-inf"):
        words = "no token is left to choose: all are banned, by logit_bias, min_tokens, ignore_eos or a grammar"
        return RowResult(error=Failure(FailureKind.INVALID_REQUEST, words))
    if row.processor is not None:
        row.processor.observe(token)
    return RowResult(token)


def _attach_logprobs(results: list[RowResult], rows: list[SampledRow], wanted: list[int], logprobs: Tensor) -> None:
    tokens = [results[i].token_id or 0 for i in wanted]
    ranked = rank_tokens(logprobs, tokens, [rows[i].params.logprobs or 0 for i in wanted])
    for i, logprob in zip(wanted, ranked, strict=True):
        if results[i].error is None:
            results[i] = RowResult(results[i].token_id, logprob)


def _filter(line: Tensor, params: SamplingParams) -> None:
    """Set to -inf what top-k, top-p and min-p leave out of one row's scaled logits [vocab]."""
    if 0 < params.top_k < line.shape[0]:
        line.masked_fill_(line < line.topk(params.top_k).values[-1], float("-inf"))
    if params.top_p < 1.0:
        line.masked_fill_(line < _top_p_border(line, params.top_p), float("-inf"))
    if params.min_p > 0.0:
        line.masked_fill_(line < line.max() + math.log(params.min_p), float("-inf"))


def _top_p_border(line: Tensor, top_p: float) -> Tensor:
    """The smallest logit of the smallest set whose probability reaches top_p."""
    total = line.logsumexp(dim=-1)
    look = min(_TOP_P_FIRST_LOOK, line.shape[0])
    while True:
        values = line.topk(look).values
        mass = (values - total).exp().cumsum(dim=-1)
        reached = int((mass < top_p).sum())  # how many come before the one that reaches it
        if reached < look or look == line.shape[0]:
            return values[min(reached, look - 1)]
        look = line.shape[0]
