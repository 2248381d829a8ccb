"""Grammars: how they are compiled with llguidance into matchers, and how a request follows its own.

A matcher knows which tokens may come next; it is the request's own, and goes on where it was after a preemption. Knows
neither threads (`scheduler/grammar_pool.py`) nor torch.

How a grammar gets along with the other ways of stopping: an EOS token is allowed only where the grammar may end, so
never in the reasoning before it. When nothing can follow, the answer ends with reason stop and no `matched`,
`min_tokens` or not; until then `min_tokens` and `ignore_eos` keep EOS out where the grammar could go on. `stop`,
`stop_token_ids` and `max_tokens` cut an answer anywhere, its reasoning too. Where bans leave no allowed token, the
request fails.
"""

import copy
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.sampling import JSON_SPELLING, MAX_SOURCE_CHARS, Grammar, GrammarKind, Thought

# Up to 0.8 KiB each. A text whose length is counted takes one for each of its bytes, and more for what may follow.
_MAX_LEXER_STATES = 50_000
# A matcher is renewed in the middle of a step, for which all others wait: only if its grammar compiles in this time,
# and only so often.
_RENEWABLE_S, _RENEWAL_TOKENS = 0.2, 32

# The schema's own `x-guidance` does not come into it.
_JSON_OPTIONS: Any = {**JSON_SPELLING, "whitespace_pattern": None, "coerce_one_of": False, "lenient": False}

# Of reasoning: anything, and what models write behind its end.
_TERMINALS = "ANY: /(?s:.*)/\nSPACE: /[ \\n]{0,2}/"

# llguidance's converter drops their leading zeros, and then cannot read them. A backslash hides the one after it.
_GBNF_CODE_POINT = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|\\)")

# Of a schema inside a grammar: its line, what is wrong, and the lines around it.
_SCHEMA_ERROR = re.compile(r"at (\d+)\(\d+\): failed to compile JSON schema: (.*?)\n +\d+ \| ", re.DOTALL)
_NOT_FETCHED = " is not present in a registry and retrieving it failed: Default retriever does not fetch resources"


class GrammarError(Exception):
    """A grammar that cannot be used; in llguidance's words where they are its own."""


def load_tokenizer(tokenizer_dir: str, vocab_size: int, eos_ids: list[int]) -> LLTokenizer:
    """`vocab_size` is that of the logits. Raises GrammarError. Holds the interpreter lock, 0.2 s for 50,000 tokens."""
    try:
        source = (Path(tokenizer_dir) / "tokenizer.json").read_text(encoding="utf-8")
        return LLTokenizer(source, n_vocab=vocab_size, eos_token=eos_ids or None)
    except (OSError, ValueError) as error:
        raise GrammarError(f"this model's tokenizer cannot be used with grammars: {error}") from error


def compile_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> list[LLMatcher]:
    """A matcher for each way that an answer may go: each part of the grammar, behind a block of reasoning or without.
    They stand at the start, their first masks computed. Raises GrammarError.

    One matcher for all would lose its way where two begin alike: a lexer takes the longest lexeme that may come, and
    never goes back."""
    thoughts = [grammar.thought]
    if grammar.thought is not None and not grammar.thought.opened:
        thoughts.append(None)
    ways = [(part, thought) for thought in thoughts for part in grammar.parts]
    return [_compile(tokenizer, part, thought, _MAX_LEXER_STATES // len(ways)) for part, thought in ways]


def _compile(tokenizer: LLTokenizer, grammar: Grammar, thought: Thought | None, max_lexer_states: int) -> LLMatcher:
    if len(grammar.source) > MAX_SOURCE_CHARS:
        raise GrammarError(f"at most {MAX_SOURCE_CHARS} characters, got {len(grammar.source)}")
    limits = llguidance.LLParserLimits(max_lexer_states=max_lexer_states, verbose_errors=False)
    try:
        source = _translate(grammar)
        if thought is not None:
            source = _behind(tokenizer, thought, source)
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    except (ValueError, RecursionError) as error:
        raise GrammarError(str(error)) from error
    if not matcher.is_error():
        matcher.compute_bitmask()  # much of the work is done only now
    if matcher.is_error():
        words = _words(matcher)
        if grammar.kind is GrammarKind.LARK and (found := _SCHEMA_ERROR.match(words)):  # whose line says what it is
            words = f"{grammar.source.splitlines()[int(found[1]) - 1].rpartition(' // ')[2]}: {found[2]}"
        raise GrammarError(words)
    return matcher


class Matcher:
    """Where a request stands in its grammar, on each way that is still open. Copies share lexers, which keep every
    state that one of them came through, and fail them all when they are full. Then a matcher follows its tokens again
    with lexers of its own."""

    def __init__(self, tokenizer: LLTokenizer, grammar: Grammar) -> None:
        """At the start of the grammar. Raises GrammarError."""
        self._source = (tokenizer, grammar)
        begun_s = time.thread_time()
        self._states = compile_grammar(tokenizer, grammar)
        self._renewable_from = 0 if time.thread_time() - begun_s < _RENEWABLE_S else math.inf
        self._tokens: list[int] = []

    def copy(self) -> "Matcher":
        """Of one that has taken no token."""
        made = copy.copy(self)
        made._states, made._tokens = [state.deep_copy() for state in self._states], []
        return made

    def advance(self, token: int) -> Failure | None:
        """Take the sampled token; what went wrong, if anything did."""
        self._tokens.append(token)
        self._follow([token])
        if self._failed() is not None:
            self._renew()
        return self.failure()

    def fill(self, bits: np.ndarray) -> bool:
        """Write which tokens may come next, a bit each, without the interpreter lock. Whether the lexer was full."""
        self._compute(bits)
        if was_full := self._failed() is not None:
            self._renew()
            self._compute(bits)
        return was_full

    def failure(self) -> Failure | None:
        """Why it has given up, if it has: a limit was hit."""
        failed = self._failed()
        return refusal(self._source[1], _words(failed)) if failed is not None else None

    def is_stopped(self) -> bool:
        return all(state.is_stopped() for state in self._states)

    def _failed(self) -> LLMatcher | None:
        return next((state for state in self._states if state.is_error()), None)

    def _compute(self, bits: np.ndarray) -> None:
        first, *others = self._states
        first.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        for state in others:
            mask = np.empty_like(bits)
            state.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            bits |= mask

    def _follow(self, tokens: list[int]) -> None:
        """On the ways that the tokens leave open. Which those are, a full lexer cannot tell."""
        if len(self._states) > 1:
            able = [s for s in self._states if s.validate_tokens(tokens) == len(tokens) or s.is_error()]
            self._states = able or self._states[:1]
        for state in self._states:
            state.consume_tokens(tokens)

    def _renew(self) -> None:
        """Where the lexer fills up at once again, it gives up."""
        if len(self._tokens) >= self._renewable_from:
            self._renewable_from = len(self._tokens) + _RENEWAL_TOKENS
            self._states = compile_grammar(*self._source)
            self._follow(self._tokens)


def refusal(grammar: Grammar, words: str) -> Failure:
    return Failure(FailureKind.INVALID_REQUEST, f"{grammar.param}: {words}", grammar.param, "invalid_value")


def _translate(grammar: Grammar) -> str:
    """To llguidance's own form. GBNF is told from Lark by the sign of its rules."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(grammar.source, overrides=_JSON_OPTIONS)
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.source)
        case GrammarKind.EBNF if "::=" in grammar.source:
            return llguidance.grammar_from("gbnf", _GBNF_CODE_POINT.sub(_spell_out, grammar.source))
        case _:
            return LLMatcher.grammar_from_lark(grammar.source)


def _behind(tokenizer: LLTokenizer, thought: Thought, source: str) -> str:
    """A block of reasoning, and then the grammar as a document of its own. Where the end tag is a special token, the
    text before it must not spell it; else the first one ends the text."""
    begin, end = (_tag(tokenizer, tag) for tag in (thought.begin, thought.end))
    spelled = json.dumps(thought.end)
    if end == spelled:
        reasoning = f"reasoning[lazy]: TEXT\nTEXT: ANY {spelled}"
    else:
        reasoning = f"reasoning: TEXT {end}\nTEXT: ANY & ~(ANY {spelled} ANY)"
    lark = f"start: {'' if thought.opened else begin} reasoning SPACE @answer\n{reasoning}\n{_TERMINALS}"
    answer = json.loads(source)["grammars"][0] if source.startswith("{") else {"lark_grammar": source}
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**answer, "name": "answer"}]})


def _tag(tokenizer: LLTokenizer, tag: str) -> str:
    """A tag in a rule: its token if it has one, which text is not taken for, else its letters."""
    special = [i for i in tokenizer.tokenize_str(tag, parse_special=True) if tokenizer.is_special_token(i)]
    return f"<[{special[0]}]>" if special else json.dumps(tag)


def _spell_out(escape: re.Match[str]) -> str:
    """A code point's escape as the character itself; of an ASCII one, which may have a meaning, as \\xHH."""
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    return chr(code) if code > 0x7F else f"\\x{code:02x}"


def _words(matcher: LLMatcher) -> str:
    words = matcher.get_error().replace("<non-verbose/>", "").replace("NoExtensionBias", "no text can match it")
    words = words.replace(_NOT_FETCHED, ": $schema must be a known draft, and $ref point into the schema itself")
    return words.strip() or f"the parser stopped: {matcher.stop_reason()}"
