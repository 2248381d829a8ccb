"""The sampler's pipeline, step by step, against plain computations."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from support.noise import gumbel

from ramet.ipc.errors import FailureKind
from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import Admission, TokenMasks
from ramet.model_runner.logits import LogitsProcessor
from ramet.model_runner.sampler import (
    CHOOSING,
    Choices,
    SampledRow,
    choice_arrays,
    choose_plainly,
    choosing,
    make_chooser,
)
from ramet.model_runner.sampler import sample as sample_with

CPU = torch.device("cpu")
VOCAB = 50


CHOOSERS = {"plain": choose_plainly, "chosen for this machine": make_chooser(CPU)}
choose_token = choose_plainly


@pytest.fixture(autouse=True, params=CHOOSERS)
def chooser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs with the plain way and with the kernel."""
    monkeypatch.setitem(globals(), "choose_token", CHOOSERS[request.param])


class At(NamedTuple):
    """A row that draws the token at a position."""

    row: SampledRow
    position: int


def choices_of(rows: list[At]) -> Choices:
    table = np.array([choosing(at.row.params) for at in rows], dtype=CHOOSING)
    arrays = choice_arrays(table, np.array([at.position for at in rows]))
    return Choices(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def sample(logits: torch.Tensor, rows: list[At], masks: TokenMasks | None = None) -> list:
    return sample_with(logits, [at.row for at in rows], choices_of(rows), choose_token, masks).results()


def row(position: int = 0, history: tuple[int, ...] = (), prompt_len: int = 0, eos: tuple[int, ...] = (), **params):
    sampling = SamplingParams(**params)
    admission = Admission(0, list(history), prompt_len, sampling, list(eos))
    return At(SampledRow(sampling, LogitsProcessor(admission, VOCAB, CPU)), position)


def logits_with(*pairs: tuple[int, float]) -> torch.Tensor:
    logits = torch.zeros(1, VOCAB)
    for token, value in pairs:
        logits[0, token] = value
    return logits


def choose(logits: torch.Tensor, **kwargs) -> int:
    return sample(logits.clone(), [row(**kwargs)])[0].token_id


def draws(logits: torch.Tensor, count: int, **params) -> list[int]:
    rows = [At(SampledRow(SamplingParams(**params), None), position) for position in range(count)]
    return [result.token_id for result in sample(logits.expand(count, -1).clone(), rows)]


def test_greedy_takes_the_largest_and_the_lowest_of_equals():
    assert choose(logits_with((7, 1.0), (9, 1.0)), temperature=0.0) == 7


def test_draws_follow_the_softmax():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    counts = torch.bincount(torch.tensor(draws(logits, 20_000, seed=5)), minlength=4) / 20_000
    # Four standard deviations of the least likely share.
    assert torch.allclose(counts, logits.exp()[0], atol=4 * math.sqrt(0.25 / 20_000))


def test_temperature_sharpens():
    logits = torch.log(torch.tensor([[0.6, 0.4]]))
    share = draws(logits, 4000, seed=1, temperature=0.25).count(0) / 4000
    assert share == pytest.approx(0.6**4 / (0.6**4 + 0.4**4), abs=0.03)


def test_noise_is_a_function_of_seed_position_and_token_alone():
    alone = gumbel([3], [17], VOCAB, CPU)
    among = gumbel([1, 3, 3], [17, 17, 18], VOCAB, CPU)
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(among[1], among[2]) and not torch.equal(among[0], among[1])
    longer = gumbel([3], [17], 2 * VOCAB, CPU)
    assert torch.equal(longer[0, :VOCAB], alone[0])


def test_noise_is_standard_gumbel_without_correlation():
    noise = gumbel(list(range(64)), [9] * 64, 4096, CPU)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert abs(torch.corrcoef(noise).fill_diagonal_(0)).max() < 0.1
    assert torch.isfinite(noise).all()


def test_noise_is_finite_for_every_hash():
    """Here the hash of token 13391 has all of its low bits set, which once was rounded up to infinite noise."""
    assert torch.isfinite(gumbel([1], [81], 49152, CPU)).all()


def test_negative_seeds_are_seeds_too():
    assert draws(torch.zeros(1, VOCAB), 20, seed=-1) != draws(torch.zeros(1, VOCAB), 20, seed=1)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.75}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"min_p": 0.25}, {0, 1, 2}),
        ({"min_p": 0.7}, {0}),
        ({"top_k": 3, "top_p": 0.5}, {0}),
        ({"top_k": -1}, {0, 1, 2, 3}),
        ({"top_k": 99, "top_p": 1.0}, {0, 1, 2, 3}),
    ],
)
def test_filters_keep_what_they_should(params, kept):
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert set(draws(logits, 2000, seed=2, **params)) == kept


def test_top_p_looks_beyond_its_first_look():
    """2,000 equally likely tokens: half of the mass is a thousand of them."""
    logits = torch.arange(2000, 0, -1).float()[None] * 1e-6
    assert 900 < max(draws(logits, 3000, seed=3, top_p=0.5)) <= 1001


def test_bias_moves_and_bans():
    logits = logits_with((3, 5.0))
    assert choose(logits, temperature=0.0, logit_bias={8: 6.0}) == 8
    assert choose(logits, temperature=0.0, logit_bias={3: -100.0}) != 3
    assert 3 not in draws_with_processor(logits, 200, logit_bias={3: -100.0})


def draws_with_processor(logits, count, **kwargs):
    return [choose(logits, position=i, seed=1, **kwargs) for i in range(count)]


def test_end_tokens_are_banned_until_min_tokens():
    logits = logits_with((3, 5.0))
    one = row(temperature=0.0, min_tokens=2, eos=(3,))
    chosen = [sample(logits.clone(), [one])[0].token_id for _ in range(3)]
    assert chosen[0] != 3 and chosen[1] != 3 and chosen[2] == 3


def test_repetition_penalty_counts_the_prompt_the_others_do_not():
    logits = logits_with((3, 5.0), (4, 4.0))
    prompt = {"history": (3,), "prompt_len": 1}
    assert choose(logits, temperature=0.0, repetition_penalty=1.5, **prompt) == 4
    assert choose(logits, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0, **prompt) == 3
    generated = {"history": (3,), "prompt_len": 0}
    assert choose(logits, temperature=0.0, presence_penalty=1.5, **generated) == 4


def test_negative_logits_are_penalised_downwards():
    logits = torch.full((1, VOCAB), -4.0)
    logits[0, 3] = -3.0
    assert choose(logits, temperature=0.0, repetition_penalty=1.5, history=(3,), prompt_len=1) != 3


def test_frequency_penalty_grows_with_each_use():
    one = row(temperature=0.0, frequency_penalty=1.0)
    logits = logits_with((3, 2.5), (4, 1.0))
    # 2.5, 1.5, then 0.5 against 1.0, 0.0 …
    assert [sample(logits.clone(), [one])[0].token_id for _ in range(4)] == [3, 3, 4, 3]


def test_logprobs_are_of_the_raw_logits():
    logits = logits_with((3, 5.0), (4, 4.0))
    expected = logits.log_softmax(-1)[0]
    (result,) = sample(logits.clone(), [row(temperature=0.0, logprobs=2, logit_bias={3: -100.0})])
    assert result.token_id == 4
    assert result.logprob.logprob == pytest.approx(expected[4].item())
    assert result.logprob.top_ids == [3, 4]
    assert result.logprob.top_logprobs == pytest.approx([expected[3].item(), expected[4].item()])


def test_rows_of_a_batch_do_not_touch_each_other():
    torch.manual_seed(0)
    logits = torch.randn(5, VOCAB)
    settings = [
        {"temperature": 0.0},
        {"temperature": 1.3, "seed": 4},
        {"temperature": 0.7, "seed": 4, "top_k": 5, "logprobs": 3},
        {"temperature": 0.9, "seed": 9, "top_p": 0.6, "presence_penalty": 1.0, "history": (1, 2), "prompt_len": 1},
        {"temperature": 0.0, "logprobs": 0},
    ]
    together = sample(logits.clone(), [row(position=3, **s) for s in settings])
    alone = [sample(logits[i : i + 1].clone(), [row(position=3, **s)])[0] for i, s in enumerate(settings)]
    assert [r.token_id for r in together] == [r.token_id for r in alone]
    assert [r.logprob and r.logprob.top_ids for r in together] == [r.logprob and r.logprob.top_ids for r in alone]


def test_nan_fails_its_own_row_only():
    logits = torch.zeros(2, VOCAB)
    logits[0, 5] = float("nan")
    logits[1, 6] = 1.0
    bad, good = sample(logits, [row(temperature=0.0), row(temperature=0.0)])
    assert "NaN" in bad.error.message and bad.error.kind is FailureKind.INTERNAL and bad.token_id is None
    assert good.token_id == 6


def test_banning_every_token_is_an_error_of_the_row():
    (result,) = sample(torch.zeros(1, VOCAB), [row(seed=1, logit_bias=dict.fromkeys(range(VOCAB), -100.0))])
    assert "banned" in result.error.message and result.error.kind is FailureKind.INVALID_REQUEST


def mask(rows: list[int], *allowed: list[int]) -> TokenMasks:
    bits = np.zeros((len(rows), -(-VOCAB // 32)), dtype=np.uint32)
    for line, tokens in zip(bits, allowed, strict=True):
        for token in tokens:
            line[token // 32] |= np.uint32(1 << token % 32)
    return TokenMasks(rows, bits)


def test_a_mask_bans_in_its_own_row_before_bias_and_leaves_logprobs_raw():
    logits = logits_with((3, 5.0), (4, 4.0)).repeat(3, 1)
    expected = logits.log_softmax(-1)[0]
    rows = [row(temperature=0.0, logprobs=1), row(temperature=0.0), row(temperature=0.0, logit_bias={9: 50.0})]
    first, free, biased = sample(logits, rows, mask([0, 2], [31, 32, 4, 49], [4, 40]))
    assert (first.token_id, free.token_id, biased.token_id) == (4, 3, 4)
    assert first.logprob.logprob == pytest.approx(expected[4].item())
    assert first.logprob.top_ids == [3]


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.1}, {"presence_penalty": -2.0}])
def test_draws_stay_inside_the_mask(params):
    allowed = [0, 31, 32, 33, 49]
    seen = {
        sample(torch.zeros(1, VOCAB), [row(position=i, seed=3, **params)], mask([0], allowed))[0].token_id
        for i in range(200)
    }
    assert seen <= set(allowed) and len(seen) > 2


def test_a_mask_and_a_ban_that_leave_nothing_are_an_error_of_the_row():
    one = row(temperature=0.0, min_tokens=3, eos=(7,))
    (result,) = sample(torch.zeros(1, VOCAB), [one], mask([0], [7]))
    assert "grammar" in result.error.message


def test_the_kernel_chooses_what_plain_torch_chooses():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 9001, generator=generator) * 3
    logits[5, 100:200] = float("-inf")
    settings = [{"temperature": 0.0}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 50, "min_p": 0.01}]
    rows = [At(SampledRow(SamplingParams(seed=i, **settings[i % 4]), None), 10 * i) for i in range(40)]
    found = [choose(logits.clone(), choices_of(rows), True) for choose in CHOOSERS.values()]
    assert torch.equal(found[0][0], found[1][0])
    greedy = torch.arange(40) % 4 == 0
    assert torch.equal(found[0][1][greedy], found[1][1][greedy])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-5)


def test_noise_is_finite_where_all_bits_are_ones():
    """For this seed and token they are; infinite noise would win against any logits."""
    assert torch.isfinite(gumbel([622], [0], 13070, CPU)).all()
    logits = torch.zeros(1, 13070)
    logits[0, 7] = 30.0
    assert sample(logits, [At(SampledRow(SamplingParams(seed=622), None), 0)])[0].token_id == 7
