"""Text never has half a character, and stops exactly where it should."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ramet.detokenizer.incremental import IncrementalText
from ramet.detokenizer.stop import StopMatcher
from ramet.detokenizer.worker import Detokenizer
from ramet.ipc.messages import Admitted, Finish, FinishReason, Logprob, PromptInfo, TokenOut
from ramet.ipc.sampling import SamplingParams
from ramet.tokenizer_worker.tokenizer import Tokenizer

LENGTH = Finish(FinishReason.LENGTH)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return Tokenizer(str(tiny_model("llama")))


def pieces(tokenizer, text: str, **params) -> list[str]:
    stream = IncrementalText(tokenizer, SamplingParams(**params))
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [stream.add(token, LENGTH if i == len(ids) - 1 else None) for i, token in enumerate(ids)]


def test_pieces_make_the_text_and_hold_whole_characters(tokenizer):
    text = "größe 日本語 👩‍🚀!"
    parts = pieces(tokenizer, text)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert "" in parts, "a character of several tokens was held back"


def test_half_a_character_at_the_end_is_replaced(tokenizer):
    stream = IncrementalText(tokenizer, SamplingParams())
    first = tokenizer.encode("日", add_special_tokens=False)[0]
    assert stream.add(first, LENGTH) == "\ufffd"


@pytest.mark.parametrize(("skip", "expected"), [(True, "ab"), (False, "a<|im_start|>b")])
def test_special_tokens_are_skipped_unless_asked_for(tokenizer, skip, expected):
    assert "".join(pieces(tokenizer, "a<|im_start|>b", skip_special_tokens=skip)) == expected


def test_stop_token_is_not_text(tokenizer):
    for keep, expected in ((False, ""), (True, "b")):
        stream = IncrementalText(tokenizer, SamplingParams(include_stop_str_in_output=keep))
        (token,) = tokenizer.encode("b", add_special_tokens=False)
        assert stream.add(token, Finish(FinishReason.STOP, token)) == expected


def cut(text: str, stops: tuple[str, ...], step: int, keep: bool = False) -> tuple[str, str | None]:
    matcher, out = StopMatcher(stops, keep), ""
    for at in range(0, len(text), step):
        out += matcher.feed(text[at : at + step])
        if matcher.matched:
            return out, matcher.matched
    return out + matcher.flush(), None


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ("two",), ("one ", "two")),
        ("one two three", ("four",), ("one two three", None)),
        ("aab", ("ab",), ("a", "ab")),
        ("a\n\nb", ("\n\n", "b"), ("a", "\n\n")),
        ("ends with a beginnin", ("beginning",), ("ends with a beginnin", None)),
    ],
)
def test_stop_string_over_any_cut(text, stops, expected, step):
    assert cut(text, stops, step) == expected


def test_stop_string_is_kept_on_wish():
    assert cut("one two three", ("two",), 1, keep=True) == ("one two", "two")


def test_only_a_possible_beginning_is_held_back():
    matcher = StopMatcher(("STOP",), False)
    assert matcher.feed("abcS") == "abc"
    assert matcher.feed("T") == ""
    assert matcher.feed("x") == "STx"


@given(
    st.text("abn", max_size=30),
    st.lists(st.text("abn", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 30),
)
@example("nabb", ["abb", "b"], 4)
def test_text_ends_before_the_stop_string_that_is_complete_first(text, stops, step):
    """However it is cut into tokens: the text before the first stop string that becomes complete."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    out, matched = cut(text, tuple(stops), step)
    if not ends:
        assert (out, matched) == (text, None)
    else:
        end, minus_length, _ = min(ends)
        assert out == text[: end + minus_length] and matched is not None


def admitted(**params) -> Admitted:
    return Admitted(PromptInfo(3), SamplingParams(**params))


def test_stop_string_finishes_now_and_aborts_at_the_scheduler(tokenizer):
    detokenizer = Detokenizer(tokenizer, stream_interval=1)
    ids = tokenizer.encode("ab\nc", add_special_tokens=False)
    deltas = detokenizer.add(TokenOut("r", ids[:1], admitted(stop=("\n",))))
    for token in ids[1:]:
        deltas += detokenizer.add(TokenOut("r", [token]))
    assert deltas[-1].finish == Finish(FinishReason.STOP, "\n")
    assert "".join(d.text for d in deltas) == "ab"
    assert detokenizer.take_stopped() == ["r"] and detokenizer.take_stopped() == []
    # What the scheduler had computed meanwhile, and its word that the request is gone, pass by.
    assert detokenizer.add(TokenOut("r", ids[:1])) == []
    assert not detokenizer._streams


def test_stop_strings_wait_for_min_tokens(tokenizer):
    detokenizer = Detokenizer(tokenizer, stream_interval=1)
    ids = tokenizer.encode("a\nb\nc", add_special_tokens=False)
    deltas = detokenizer.add(TokenOut("r", ids[:1], admitted(stop=("\n",), min_tokens=3)))
    for token in ids[1:4]:
        deltas += detokenizer.add(TokenOut("r", [token]))
    assert "".join(d.text for d in deltas) == "a\nb"
    assert deltas[-1].completion_tokens == 4


def test_an_aborted_answer_has_what_was_held_back(tokenizer):
    detokenizer = Detokenizer(tokenizer, stream_interval=1)
    ids = tokenizer.encode("ab\n", add_special_tokens=False)
    deltas = detokenizer.add(TokenOut("r", ids[:1], admitted(stop=("\n---",))))
    for token in ids[1:]:
        deltas += detokenizer.add(TokenOut("r", [token]))
    assert "".join(d.text for d in deltas) == "ab"
    deltas += detokenizer.add(TokenOut("r", finish=Finish(FinishReason.ABORT)))
    assert "".join(d.text for d in deltas) == "ab\n"
    assert deltas[-1].completion_tokens == len(ids)


def test_without_streaming_only_the_first_and_the_last_event_are_sent(tokenizer):
    detokenizer = Detokenizer(tokenizer, stream_interval=1)
    first = Admitted(PromptInfo(3, 2), SamplingParams(), stream=False)
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    deltas = detokenizer.add(TokenOut("r", [ids[0]], first))
    for token in ids[1:-1]:
        deltas += detokenizer.add(TokenOut("r", [token]))
    deltas += detokenizer.add(TokenOut("r", [ids[-1]], finish=LENGTH))
    assert len(deltas) == 2
    assert deltas[0].prompt.cached_tokens == 2 and deltas[1].prompt is None
    assert "".join(d.text for d in deltas) == "the cat"
    assert deltas[1].completion_tokens == len(ids)


def test_logprobs_show_each_tokens_own_bytes(tokenizer):
    detokenizer = Detokenizer(tokenizer, stream_interval=1)
    half = tokenizer.encode("日", add_special_tokens=False)[0]
    (other,) = tokenizer.encode("b", add_special_tokens=False)
    out = TokenOut("r", [half], admitted(logprobs=1), [Logprob(half, -0.5, [other], [-0.1])])
    (delta,) = detokenizer.add(out)
    (entry,) = delta.logprobs
    assert entry.data == "日".encode()[: len(entry.data)] and entry.token == "\ufffd"
    assert entry.top[0].token == "b" and entry.top[0].logprob == pytest.approx(-0.1)


def test_echoed_prompt_is_decoded(tokenizer):
    detokenizer = Detokenizer(tokenizer, stream_interval=1)
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    logprobs = [None, *(Logprob(i, -1.0) for i in ids[1:])]
    info = Admitted(PromptInfo(len(ids)), SamplingParams(prompt_logprobs=0), True, ids, logprobs)
    (delta,) = detokenizer.add(TokenOut("r", [], info, finish=LENGTH))
    assert delta.prompt.text == "the cat"
    assert "".join(t.token for t in delta.prompt.tokens) == "the cat"
    assert delta.prompt.tokens[0].logprob != delta.prompt.tokens[0].logprob
