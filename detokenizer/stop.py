"""Stop strings: found in the text as it grows, over token boundaries.

Text that could still turn out to be the beginning of a stop string is held back. Does not know tokens.
"""


class StopMatcher:
    """`feed` text; `matched` is the stop string that ended it: the one that is complete first, however the text is cut,
    and the longest of those that end together."""

    def __init__(self, stops: tuple[str, ...], keep_match: bool) -> None:
        self._stops = stops
        self._keep_match = keep_match
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Text that is certainly before any stop string. After a match, nothing is to be fed any more."""
        if not self._stops:
            return text
        held = self._held + text
        found = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            end, minus_length, self.matched = min(found)
            self._held = ""
            return held[:end] if self._keep_match else held[: end + minus_length]
        keep = self._could_begin_a_stop(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What is still held back, when the text has ended; nothing after a match."""
        held, self._held = self._held, ""
        return held

    def _could_begin_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
