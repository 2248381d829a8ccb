"""`ToolCallParser`: finds tool calls in a model's text as it comes, and gives them as deltas of the API.

A form is a pair of patterns: how a call starts, up to its arguments, and what stands between its arguments and the
next text or call. The arguments between them are passed on as they are written. Text that may still turn out to start
a call is held back (patterns are matched partially); what is no call comes out as content.

Invariants: a call is told only once its name is known to be one of the request's tools, so nothing is ever taken back.
Without a call the content is the text to the last character; beside calls, only white space and their markup go.
"""

import secrets
from collections.abc import Callable, Collection
from typing import Any

import msgspec
import regex

Delta = dict[str, Any]

# The start of a call's object, up to the brace of its arguments; without arguments, up to its own closing brace.
_HEAD = (
    r'\{\s*(?:"(?:id|type)"\s*:\s*"[^"\\]{0,64}"\s*,\s*)*"name"\s*:\s*"(?P<name>[\w-]{1,64})"\s*'
    r'(?:,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)|(?=\}))'
)
_LIST = r"(?P<list>\[\s*)?"
_END_OF_OBJECT = regex.compile(r"\s*\}")


class _Form(msgspec.Struct, frozen=True):
    """`single` and `listed`: what follows the arguments of a call that stands alone, or in a list. `named`: a call
    that is its name and arguments, after which nothing follows."""

    start: Any
    single: Any
    listed: Any


def _form(start: str, end: str = "", separator: str = "", named: str = "") -> _Form:
    # A closing tag makes up for a forgotten brace.
    single = rf"\s*\}}\s*{separator}\s*{_HEAD}" if separator else rf"\s*\}}{'?' if end else ''}{end}"
    return _Form(
        start=regex.compile(rf"{start}(?:{_LIST}{_HEAD}{named})"),
        single=regex.compile(single),
        listed=regex.compile(rf"\s*\}}\s*(?:,\s*{_HEAD}|\]{end})"),
    )


FORMS = {
    "hermes": _form(r"<tool_call>\s*", end=r"\s*</tool_call>"),
    "llama3": _form(r"(?:<\|python_tag\|>\s*)?", separator=";"),
    "mistral": _form(
        r"\[TOOL_CALLS\]\s*", named=r"|(?P<named>[\w-]{1,64})\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*(?=\{)"
    ),
    "json": _form(""),
}


class ToolCallParser:
    """The calls of one choice. `names` are those that may be called; without `parallel`, what follows the first call
    is dropped. With `lead`, a text that does not begin with a call has none."""

    def __init__(self, form: str, names: Collection[str], parallel: bool, lead: bool = False) -> None:
        self._form = FORMS[form]
        self._names = names
        self._parallel = parallel
        self._state: Callable[[bool], bool] = self._lead if lead else self._text
        self._held = ""
        self._space = ""  # white space after content: dropped if a call follows
        self._deltas: list[Delta] = []
        self.num_calls = 0

    def feed(self, text: str, final: bool) -> list[Delta]:
        """What is certain now; with `final`, the text has ended."""
        self._held += text
        while self._state(final):
            pass
        if final and not self.num_calls and self._space:
            self._deltas.append({"content": self._space})
        deltas, self._deltas = self._deltas, []
        return deltas

    # A state takes from `_held` what it can; true if there is more to do, in another state or its own.

    def _lead(self, final: bool) -> bool:
        match = self._form.start.match(self._held, partial=True)
        is_partial = match is not None and match.partial
        if is_partial and not final:
            return False
        is_call = match is not None and not is_partial and self._name(match) in self._names
        self._state = self._text if is_call else self._plain
        return True

    def _plain(self, _final: bool) -> bool:
        self._say(len(self._held))
        return False

    def _text(self, final: bool) -> bool:
        match = self._form.start.search(self._held, partial=True)
        start = match.start() if match else len(self._held)
        if final and match and match.partial:
            start = len(self._held)
        if match is None or match.partial:
            self._say(start)
            return False
        if self._name(match) not in self._names:
            self._say(match.end())
            return True
        self._say(start)
        self._begin(match)
        return True

    def _arguments(self, _final: bool) -> bool:
        end = self._scanner.end_in(self._held)
        arguments, self._held = self._held[:end], self._held[end:]
        if arguments:
            self._call({"function": {"arguments": arguments}})
        if not self._scanner.done:
            return False
        self._state = self._after
        return True

    def _after(self, final: bool) -> bool:
        if self._after_form is None:
            self._state = self._text
            return True
        match = self._after_form.match(self._held, partial=True)
        if match is not None and match.partial:
            if final:  # only the markup of a call is incomplete
                self._held = ""
            return False
        name = self._name(match) if match else None
        if match is None or (name is not None and name not in self._names):
            end = _END_OF_OBJECT.match(self._held)
            self._held = self._held[end.end() if end else 0 :]
            self._state = self._text
        elif name is not None:
            self._begin(match)
        else:
            self._held = self._held[match.end() :]
            self._state = self._text
        return True

    def _dropped(self, _final: bool) -> bool:
        self._held = ""
        return False

    def _say(self, end: int) -> None:
        """What is held up to `end` is content."""
        text = self._space + self._held[:end]
        self._held = self._held[end:]
        content = text.rstrip()
        self._space = text[len(content) :]
        if content:
            self._deltas.append({"content": content})

    def _begin(self, match: Any) -> None:
        """A call whose start is what is held first."""
        if self.num_calls and not self._parallel:
            self._state = self._dropped
            return
        found = match.groupdict()
        if found.get("named"):
            self._after_form = None
        elif "list" in found:
            self._after_form = self._form.listed if found["list"] else self._form.single
        self._held, self._space = self._held[len(match[0]) :], ""
        self.num_calls += 1
        self._scanner = _ObjectScanner()
        self._state = self._arguments
        function = {"name": self._name(match), "arguments": ""}
        self._call({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        if self._held.startswith("}"):
            self._call({"function": {"arguments": "{}"}})
            self._state = self._after

    def _call(self, delta: Delta) -> None:
        self._deltas.append({"tool_calls": [{"index": self.num_calls - 1, **delta}]})

    @staticmethod
    def _name(match: Any) -> str | None:
        found = match.groupdict()
        return found.get("name") or found.get("named")


class _ObjectScanner:
    """Finds the end of a JSON object, which starts with the first text given."""

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end_in(self, text: str) -> int:
        """How much of the text belongs to the object."""
        for at, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.done = True
                    return at + 1
        return len(text)
