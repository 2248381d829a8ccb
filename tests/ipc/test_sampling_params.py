"""Each range is refused with the parameter's name, the limit and the value."""

import pytest

from ramet.ipc.errors import RequestError
from ramet.ipc.sampling import SamplingParams


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", 2.5, ["2.5", "0 and 2"]),
        ("temperature", float("nan"), ["nan"]),
        ("top_p", -0.1, ["-0.1", "0 and 1"]),
        ("min_p", 1.1, ["1.1"]),
        ("top_k", -2, ["-2"]),
        ("presence_penalty", 3.0, ["3", "-2 and 2"]),
        ("frequency_penalty", -2.1, ["-2.1"]),
        ("repetition_penalty", 0.0, ["above 0"]),
        ("max_tokens", -1, ["-1"]),
        ("min_tokens", -1, ["-1"]),
        ("seed", 2**63, [str(2**63)]),
        ("stop", ("x",) * 17, ["16", "17"]),
        ("stop", ("",), ["empty"]),
    ],
)
def test_value_out_of_range_is_refused(name, value, words):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value}).validate()
    failure = caught.value.failure
    assert failure.param == name
    assert all(word in failure.message for word in words)


def test_logprobs_and_bias_name_what_the_client_sent():
    with pytest.raises(RequestError, match="21") as caught:
        SamplingParams(logprobs=21).validate()
    assert caught.value.failure.param == "top_logprobs"
    with pytest.raises(RequestError, match="101") as caught:
        SamplingParams(logit_bias={7: 101.0}).validate()
    assert caught.value.failure.param == "logit_bias.7"


def test_limits_themselves_are_allowed():
    SamplingParams(
        temperature=2.0, top_p=0.0, top_k=-1, min_p=1.0, presence_penalty=-2.0, logprobs=20, logit_bias={1: -100.0}
    ).validate()


def test_greedy_is_every_way_to_say_the_most_likely():
    assert SamplingParams(temperature=0.0).greedy
    assert SamplingParams(top_k=1).greedy
    assert SamplingParams(top_p=0.0).greedy
    assert not SamplingParams().greedy
