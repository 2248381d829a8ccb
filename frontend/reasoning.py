"""`ReasoningParser`: tells a model's reasoning, between two tags at the start of its answer, from the content.

Held back is what may turn out to be a tag, and white space beside tags, which belongs to neither part. An answer has
one block of reasoning; tags that come later are content.
"""

import enum

TAGS = {
    "think": ("<think>", "</think>"),
    "deepseek-r1": ("<think>", "</think>"),
    "qwen3": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
}


class _State(enum.Enum):
    START = enum.auto()
    REASONING = enum.auto()
    SEAM = enum.auto()  # after the end tag, before any content
    CONTENT = enum.auto()


class ReasoningParser:
    def __init__(self, family: str) -> None:
        self._begin, self._end = TAGS[family]
        self._opened = False
        self._held = ""
        self._state = _State.START
        self._spoken = False  # whether any reasoning was given out: white space before it is dropped
        self.num_tokens = 0  # generated until the end tag was delivered

    def after_prompt(self, tail: str) -> None:
        """The end of the prompt, to be told before any text: templates may open the block themselves."""
        self._opened = tail.rstrip().endswith(self._begin)

    def feed(self, text: str, num_tokens: int, final: bool) -> tuple[str, str]:
        """Reasoning and content that are certain now; with `final`, the text has ended. `num_tokens`: how many have
        been generated in all."""
        if self._state is _State.CONTENT:
            return "", text
        self._held += text
        reasoning = ""
        if self._state is _State.START:
            self._start(final)
        if self._state is _State.REASONING:
            reasoning, self.num_tokens = self._reason(final), num_tokens
        if self._state is _State.SEAM:
            self._held = self._held.lstrip()
            if self._held:
                self._state = _State.CONTENT
        content = ""
        if self._state is _State.CONTENT:
            content, self._held = self._held, ""
        return reasoning, content

    def _start(self, final: bool) -> None:
        text = self._held.lstrip()
        if text.startswith(self._begin):
            self._held = text[len(self._begin) :]
            self._state = _State.REASONING
        elif final or not self._begin.startswith(text):
            self._state = _State.REASONING if self._opened else _State.CONTENT

    def _reason(self, final: bool) -> str:
        if not self._spoken:
            self._held = self._held.lstrip()
        at = self._held.find(self._end)
        if at >= 0:
            reasoning, self._held = self._held[:at].rstrip(), self._held[at + len(self._end) :]
            self._state = _State.SEAM
        elif final:
            reasoning, self._held = self._held, ""
        else:
            sure = self._held[: len(self._held) - _overlap(self._held, self._end)].rstrip()
            reasoning, self._held = sure, self._held[len(sure) :]
        self._spoken = self._spoken or bool(reasoning)
        return reasoning


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` begins."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
