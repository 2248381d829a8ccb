"""Reasoning and content of one answer, however the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.frontend.reasoning import ReasoningParser

OPEN = "<|im_start|>assistant\n<think>\n"


def split(*texts: str, tail: str = "", family: str = "think") -> tuple[str, str]:
    parser = ReasoningParser(family)
    parser.after_prompt(tail)
    parts = [parser.feed(text, i, final=False) for i, text in enumerate(texts, 1)]
    parts.append(parser.feed("", len(texts), final=True))
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "tail", "expected"),
    [
        ("<think>\nHm.\n\nSo.\n</think>\n\nParis. ", "", ("Hm.\n\nSo.", "Paris. ")),
        ("\n<think></think>Paris", "", ("", "Paris")),
        ("Hm.</think>Paris", OPEN, ("Hm.", "Paris")),
        ("<think>Hm.</think>Paris", OPEN, ("Hm.", "Paris")),
        ("Hm. </thin", OPEN, ("Hm. </thin", "")),
        ("Paris", OPEN + "\n</think>\n\n", ("", "Paris")),
        ("Paris </think>", "", ("", "Paris </think>")),
        (" Paris <think>x</think>", "", ("", " Paris <think>x</think>")),
        ("<think>a <b> < /think></think>c<think>d</think>", "", ("a <b> < /think>", "c<think>d</think>")),
        ("<thin", "", ("", "<thin")),
        ("  ", "", ("", "  ")),
        ("", OPEN, ("", "")),
    ],
)
def test_parts(text: str, tail: str, expected: tuple[str, str]) -> None:
    assert split(text, tail=tail) == expected
    assert split(*text, tail=tail) == expected


def test_the_tags_of_mistral() -> None:
    assert split("[THINK]a[/THINK]b", family="mistral") == ("a", "b")
    assert split("a[/THINK]b", tail="[THINK]", family="mistral") == ("a", "b")


@given(
    pieces=st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "th", " ", "\n", "a", "é"]), max_size=14),
    tail=st.sampled_from(["", OPEN]),
    data=st.data(),
)
def test_chunks_do_not_matter_and_nothing_is_lost(pieces: list[str], tail: str, data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    reasoning, content = split(*chunks, tail=tail)
    assert (reasoning, content) == split(text, tail=tail)
    seen = "".join((reasoning + content).split())
    tags = text.count("<think>") + text.count("</think>") - seen.count("<think>") - seen.count("</think>")
    # At most one pair of tags is gone, and white space beside them.
    whole = "".join(text.split())
    assert len(whole) - len(seen) in {0, len("<think>"), len("</think>"), len("<think></think>")}
    assert 0 <= tags <= 2


def test_tokens_are_counted_until_the_end_tag() -> None:
    parser = ReasoningParser("think")
    for count, text in enumerate(["<think>", "a", "</th", "ink>", "b", "c"], 1):
        parser.feed(text, count, final=False)
    assert parser.num_tokens == 4
    parser = ReasoningParser("think")
    parser.feed("b", 1, final=True)
    assert parser.num_tokens == 0
