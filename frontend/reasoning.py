"""`ReasoningParser`: tells a model's reasoning, between two tags at the start of its answer, from the content.

Held back is what may turn out to be a tag, and white space beside tags, which belongs to neither part. An answer has
one block of reasoning; tags that come later are content.
"""

from typing import Literal

from ramet.ipc.sampling import Thought

THOUGHTS = {
    **dict.fromkeys(("think", "deepseek-r1", "qwen3"), Thought("<think>", "</think>")),
    "mistral": Thought("[THINK]", "[/THINK]"),
}


class ReasoningParser:
    def __init__(self, family: str) -> None:
        self._thought = THOUGHTS[family]
        self._begin, self._end = self._thought.begin, self._thought.end
        self._opened = False
        self._held = ""
        self._state: Literal["start", "reasoning", "content"] = "start"
        self._at_tag = False  # white space that comes now is dropped
        self.num_tokens = 0  # generated until the end tag was delivered

    def after_prompt(self, tail: str) -> None:
        """The end of the prompt, to be told before any text: templates may open the block themselves."""
        thought = self._thought.after(tail)
        self._opened = thought is not None and thought.opened

    def feed(self, text: str, num_tokens: int, final: bool) -> tuple[str, str]:
        """Reasoning and content that are certain now; with `final`, the text has ended. `num_tokens`: how many have
        been generated in all."""
        self._held += text
        reasoning = content = ""
        if self._state == "start":
            self._start(final)
        if self._state == "reasoning":
            reasoning, self.num_tokens = self._reason(final), num_tokens
        if self._state == "content":
            self._strip()
            content, self._held = self._held, ""
        return reasoning, content

    def _start(self, final: bool) -> None:
        text = self._held.lstrip()
        if text.startswith(self._begin):
            self._held, self._opened = text[len(self._begin) :], True
        elif not final and self._begin.startswith(text):
            return
        self._state, self._at_tag = ("reasoning", True) if self._opened else ("content", False)

    def _reason(self, final: bool) -> str:
        self._strip()
        reasoning, tag, rest = self._held.partition(self._end)
        if tag:
            self._state, self._held, self._at_tag = "content", rest, True
            return reasoning.rstrip()
        if not final:
            reasoning = reasoning[: len(reasoning) - _overlap(reasoning, self._end)].rstrip()
        self._held = self._held[len(reasoning) :]
        return reasoning

    def _strip(self) -> None:
        if self._at_tag:
            self._held = self._held.lstrip()
            self._at_tag = not self._held


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` begins."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
