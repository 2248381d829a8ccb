"""Grammars: how they are compiled with llguidance into matchers, and how a request follows its own.

A matcher knows which tokens may come next; it is the request's own, and goes on where it was after a preemption. Knows
neither threads (`scheduler/grammar_pool.py`) nor torch.

How a grammar gets along with the other ways of stopping: an EOS token is allowed only where the grammar may end. When
nothing can follow, the answer ends with reason stop and no `matched`, `min_tokens` or not; until then `min_tokens` and
`ignore_eos` keep EOS out where the grammar could go on. `stop`, `stop_token_ids` and `max_tokens` cut an answer
anywhere. Where bans leave no allowed token, the request fails.
"""

import re
from pathlib import Path
from typing import Any

import llguidance
from llguidance import LLMatcher, LLTokenizer

from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.sampling import JSON_SPELLING, Grammar, GrammarKind
from ramet.scheduler.request import Request

MAX_SOURCE_CHARS = 256 * 1024

# The schema's own `x-guidance` does not come into it.
_JSON_OPTIONS: Any = {**JSON_SPELLING, "whitespace_pattern": None, "coerce_one_of": False, "lenient": False}

# llguidance's converter drops their leading zeros, and then cannot read them. A backslash hides the one after it.
_GBNF_CODE_POINT = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|\\)")


class GrammarError(Exception):
    """A grammar that cannot be used; in llguidance's words where they are its own."""


def load_tokenizer(tokenizer_dir: str, vocab_size: int, eos_ids: list[int]) -> LLTokenizer:
    """`vocab_size` is that of the logits. Raises GrammarError. Holds the interpreter lock, 0.2 s for 50,000 tokens."""
    try:
        source = (Path(tokenizer_dir) / "tokenizer.json").read_text(encoding="utf-8")
        return LLTokenizer(source, n_vocab=vocab_size, eos_token=eos_ids or None)
    except (OSError, ValueError) as error:
        raise GrammarError(f"this model's tokenizer cannot be used with grammars: {error}") from error


def compile_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """A matcher at the start of the grammar, its first mask computed. Raises GrammarError."""
    if len(grammar.source) > MAX_SOURCE_CHARS:
        raise GrammarError(f"at most {MAX_SOURCE_CHARS} characters, got {len(grammar.source)}")
    limits = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
    try:
        matcher = LLMatcher(tokenizer, _translate(grammar), log_level=0, limits=limits)
    except (ValueError, RecursionError) as error:
        raise GrammarError(str(error)) from error
    if not matcher.is_error():
        matcher.compute_bitmask()  # much of the work is done only now
    if matcher.is_error():
        raise GrammarError(_words(matcher))
    return matcher


def advance(request: Request, token: int) -> Failure | None:
    """Take the sampled token into the request's matcher; what went wrong, if anything did."""
    assert request.matcher is not None
    request.matcher.consume_token(token)
    return matcher_failure(request)


def matcher_failure(request: Request) -> Failure | None:
    """Whether the matcher, if there is one, has given up: a limit was hit."""
    if request.matcher is None or not request.matcher.is_error():
        return None
    assert request.params.grammar is not None
    return refusal(request.params.grammar, _words(request.matcher))


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


def _spell_out(escape: re.Match[str]) -> str:
    """A code point's escape as the character itself; of an ASCII one, which may have a meaning, as \\xHH."""
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    return chr(code) if code > 0x7F else f"\\x{code:02x}"


def _words(matcher: LLMatcher) -> str:
    return matcher.get_error().replace("<non-verbose/>", "").strip() or f"the parser stopped: {matcher.stop_reason()}"
