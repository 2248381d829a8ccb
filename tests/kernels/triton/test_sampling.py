"""The device's choice of tokens equals the plain one, noise and filters included."""

import numpy as np
import pytest
import torch
from support.noise import gumbel
from support.triton_device import DEVICE, kernel_test, randn

from ramet.ipc.sampling import SamplingParams
from ramet.model_runner.sampler import CHOOSING, Choices, choice_arrays, choose_on_cuda, choose_plainly, choosing

pytestmark = kernel_test
VOCAB = 5000  # more than a block

Row = tuple[SamplingParams, int]


def row(seed: int = 0, position: int = 5, **params) -> Row:
    return SamplingParams(max_tokens=8, seed=seed, **params), position


def both(logits: torch.Tensor, rows: list[Row]):
    """What is chosen and what it won with, plainly and by the kernel."""
    params, positions = zip(*rows, strict=True)
    arrays = choice_arrays(np.array([choosing(p) for p in params], dtype=CHOOSING), np.array(positions))
    choices = Choices(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    filtered = any(not p.greedy and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params)
    plain = choose_plainly(logits.clone(), choices, filtered)
    there = Choices(*(tensor.to(DEVICE) for tensor in choices))
    tokens, best = choose_on_cuda(logits.clone().to(DEVICE), there, filtered)
    return plain, (tokens.cpu(), best.cpu())


def same(logits: torch.Tensor, rows: list[Row]) -> None:
    (tokens, best), (device_tokens, device_best) = both(logits, rows)
    assert device_tokens.tolist() == tokens.tolist()
    torch.testing.assert_close(device_best, best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
        {"top_k": VOCAB + 5},
        {"top_p": 1e-9},
    ],
    ids=str,
)
def test_equals_the_plain_choice(params):
    logits = 2 * randn(6, VOCAB)
    same(logits, [row(seed=i * 2**40, position=i, **params) for i in range(6)])


def test_rows_of_one_batch_do_not_touch_each_other():
    kinds = [{"temperature": 0.0}, {"top_k": 3}, {}, {"temperature": 0.0, "top_p": 0.1}, {"min_p": 0.5}]
    logits = randn(len(kinds), VOCAB)
    rows = [row(seed=i, **kind) for i, kind in enumerate(kinds)]
    same(logits, rows)
    alone = [both(logits[i : i + 1], rows[i : i + 1])[1][0].item() for i in range(len(rows))]
    assert both(logits, rows)[1][0].tolist() == alone


def test_a_tie_goes_to_the_lowest_id():
    logits = torch.zeros(2, VOCAB)
    logits[:, [17, 900, 4800]] = 3.0
    assert both(logits, [row(temperature=0.0)] * 2)[1][0].tolist() == [17, 17]


def test_ties_at_a_border_are_kept():
    logits = torch.full((64, VOCAB), -50.0)
    logits[:, [3, 9]] = 1.0
    _, (tokens, _) = both(logits, [row(seed=i, top_p=0.4) for i in range(64)])
    assert set(tokens.tolist()) == {3, 9}


def test_nan_and_no_token_left_are_told_by_value():
    logits = randn(4, VOCAB)
    logits[0, 4500] = logits[1, 2] = float("nan")
    logits[2] = logits[3] = float("-inf")
    _, (_, best) = both(logits, [row(), row(temperature=0.0), row(top_p=0.5), row(temperature=0.0)])
    assert best.isnan().tolist() == [True, True, False, False]
    assert best[2:].tolist() == [float("-inf")] * 2


def test_noise_is_that_of_the_cpu():
    """Read off through logits that leave one token a row."""
    tokens = torch.arange(8) * 700
    logits = torch.full((8, VOCAB), float("-inf"))
    logits[torch.arange(8), tokens] = 0.0
    rows = [row(seed=2**63 - i, position=i) for i in range(8)]
    _, (chosen, best) = both(logits, rows)
    assert torch.equal(chosen, tokens)
    noise = gumbel([params.seed for params, _ in rows], [position for _, position in rows], VOCAB, torch.device("cpu"))
    torch.testing.assert_close(best, noise[torch.arange(8), tokens], rtol=1e-6, atol=1e-6)
