"""Grammars: compiled, refused, cached, held; and how requests follow them through the core and a real runner."""

import json
import re
import threading
from collections.abc import Iterator

import llguidance
import msgspec
import numpy as np
import pytest
import tokenizers
import torch
from support.engine import InlineEngine
from support.server import PATIENCE_S

from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.messages import FinishReason, Generate
from ramet.ipc.sampling import MAX_SOURCE_CHARS, Grammar, GrammarKind, SamplingParams, Thought
from ramet.scheduler.config import SchedulerConfig
from ramet.scheduler.grammar import Matcher, load_tokenizer
from ramet.scheduler.grammar_pool import GrammarPool
from ramet.scheduler.request import Request

PROMPT = [5, 77, 130, 8, 250, 91, 4, 33, 60, 12, 200]
EOS_ID = 2


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source, "regex")


def schema(value: object) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(value), "response_format")


class Pool:
    """A pool, and a loop that sleeps until the pool wakes it."""

    def __init__(self, folder: str, vocab_size: int) -> None:
        self.folder, self.wakes = folder, 0
        self._woken = threading.Event()
        config = SchedulerConfig(
            page_size=8,
            max_running=8,
            max_step_tokens=64,
            max_prefill_tokens=32,
            context_length=100,
            eos_ids=(EOS_ID, 10**6),
            tokenizer_dir=folder,
        )
        self.pool = GrammarPool(config, vocab_size, self._wake)

    def _wake(self) -> None:
        self.wakes += 1
        self._woken.set()

    def hold(self, *grammars: Grammar) -> None:
        for i, grammar in enumerate(grammars):
            self.pool.hold(Generate(f"r{i}", [1], SamplingParams(max_tokens=9, grammar=grammar)))

    def outcomes(self, *grammars: Grammar) -> dict[str, Matcher | Failure]:
        """What becomes of these, and of what is held already."""
        self.hold(*grammars)
        done: dict[str, Matcher | Failure] = {}
        while self.pool.held_rids:
            ready = self.pool.take_ready()
            done |= {message.rid: made for message, made in ready}
            if not ready:
                assert self._woken.wait(PATIENCE_S)
                self._woken.clear()
        return done

    def outcome(self, grammar: Grammar) -> Matcher | Failure:
        return self.outcomes(grammar)["r0"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(tiny_model("llama") / "tokenizer.json"))


@pytest.fixture(scope="module")
def pool(tiny_model, tokenizer) -> Iterator[Pool]:
    """The model pads its vocabulary."""
    pool = Pool(str(tiny_model("llama")), tokenizer.get_vocab_size() + 37)
    yield pool
    pool.pool.close()


def accepts(matcher: Matcher | Failure, tokenizer: tokenizers.Tokenizer, text: str) -> bool:
    assert isinstance(matcher, Matcher), matcher
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    states = [state.deep_copy() for state in matcher._states]
    return any(state.try_consume_tokens(ids) == len(ids) and state.is_accepting() for state in states)


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (
            schema({"type": "object"}),
            ["{}", '{"a": [1, {"b": null}]}'],
            ['{"a":1}', "[]", "{ }", "{}\n", '{"a": "\\u0061"}'],
        ),
        (
            schema({"type": "array", "x-guidance": {"whitespace_flexible": True, "item_separator": ";"}}),
            ["[1, 2]"],
            ["[1,2]", "[1;2]"],
        ),
        (regex("(ab){2}|c?"), ["abab", "c", ""], ["ab", "cc"]),
        (Grammar(GrammarKind.LARK, 'start: A "!"\nA: /[0-9]+/', "x"), ["12!"], ["!", "12"]),
        (Grammar(GrammarKind.EBNF, 'start: A "!"\nA: /[0-9]+/', "ebnf"), ["12!"], ["!"]),
        (
            Grammar(GrammarKind.EBNF, 'root ::= term ("+" term)* # sums\nterm ::= [0-9]+ | "(" root ")"', "ebnf"),
            ["1", "(1+22)+3"],
            ["1+", "()"],
        ),
        (
            Grammar(
                GrammarKind.EBNF,
                r'root ::= "\"" [^"\\\n\x7F]{1,3} "\"" | [\u00e8-\u00ea\u0022] | "\u0021\U0001F600"',
                "ebnf",
            ),
            ['"a/b"', "é", '"', "!😀"],
            ['""', '"\\"', "e"],
        ),
    ],
)
def test_what_is_allowed(
    pool: Pool, tokenizer: tokenizers.Tokenizer, grammar: Grammar, good: list[str], bad: list[str]
):
    matcher = pool.outcome(grammar)
    assert [text for text in good if not accepts(matcher, tokenizer, text)] == []
    assert [text for text in bad if accepts(matcher, tokenizer, text)] == []


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (schema({"not": {}}), "not"),
        (schema({"type": "string", "format": "json-pointer"}), "json-pointer"),
        (schema({"oneOf": [{"type": "integer"}, {"type": "number"}], "x-guidance": {"coerce_one_of": True}}), "oneOf"),
        (schema({"type": "object", "dependentRequired": {}, "x-guidance": {"lenient": True}}), "dependentRequired"),
        (schema({"$ref": "https://example.com/schema.json"}), "example.com"),
        (schema({"$ref": "#"}), "no text can match it"),
        (schema({"minimum": 5, "maximum": 3, "type": "integer"}), "minimum"),
        (schema({"type": "zap"}), "zap"),
        (regex("(a"), "unclosed"),
        (regex("a(?=b)"), "look-ahead"),
        (regex("x" * (MAX_SOURCE_CHARS + 1)), f"{MAX_SOURCE_CHARS} characters, got {MAX_SOURCE_CHARS + 1}"),
        (Grammar(GrammarKind.EBNF, "root ::= zap", "ebnf"), "zap"),
        (Grammar(GrammarKind.EBNF, "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "ebnf"), "recursion"),
        (Grammar(GrammarKind.LARK, "start: zap", "tools"), "zap"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_grammar_is_refused_with_the_parameter_and_the_reason(pool: Pool, grammar: Grammar, words: str):
    failure = pool.outcome(grammar)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.param) == (FailureKind.INVALID_REQUEST, grammar.param)
    assert failure.message.startswith(f"{grammar.param}: ") and words in failure.message


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"$defs": {"x": {"$ref": "#/$defs/y"}, "y": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}, "no text can match"),
        ({"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]}, "no text can match it"),
        ({"$ref": "#/$defs/x"}, "'/$defs/x' does not exist"),
        ({"enum": []}, "anyOf is empty"),
        ({"oneOf": []}, "oneOf is empty"),
        ({"type": []}, "anyOf is empty"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "incompatible types"),
        ({"const": "x", "type": "integer"}, "incompatible types"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength (5) is greater than maxLength (3)"),
        ({"type": "string", "maxLength": -1}, "'maxLength', got -1"),
        ({"type": "string", "format": "zap"}, "Unknown format: zap"),
        ({"type": "string", "pattern": r"[^\s\S]"}, "Regex is empty"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "array", "minItems": 3, "maxItems": 1}, "minItems (3) is greater than maxItems (1)"),
        ({"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}, "required item is unsatisfiable"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a' is unsatisfiable"),
        ({"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 6}, "does not contain a multiple of 7"),
        ({"type": "integer", "multipleOf": 0}, "multiple of"),
        ({"type": "integer", "minimum": 10**400}, "number out of range"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, '"if", "then"'),
        ({"properties": []}, "properties must be an object"),
        ({"properties": {"a": False}, "required": ["a"], "type": "object"}, "required property 'a' is unsatisfiable"),
        (
            {"$schema": "http://x/y"},
            "Resource 'http://x/y': $schema must be a known draft, and $ref point into",
        ),
    ],
    ids=repr,
)
def test_a_schema_that_nothing_can_match_is_refused_with_the_reason(pool: Pool, value: object, words: str):
    failure = pool.outcome(schema(value))
    assert isinstance(failure, Failure)
    assert words in failure.message and failure.kind is FailureKind.INVALID_REQUEST


@pytest.mark.parametrize(
    "grammar", [regex(r"[^\s\S]"), Grammar(GrammarKind.EBNF, "root ::= root", "ebnf")], ids=["regex", "ebnf"]
)
def test_other_grammars_that_match_nothing(pool: Pool, grammar: Grammar):
    failure = pool.outcome(grammar)
    assert isinstance(failure, Failure) and failure.message == f"{grammar.param}: no text can match it"


@pytest.mark.parametrize(
    ("value", "good", "bad"),
    [
        ({"type": "array", "items": {"$ref": "#"}}, "[[], [[]]]", "[1]"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "null", "1"),
        (
            {"type": "object", "properties": {"a": False}, "additionalProperties": {"type": "null"}},
            '{"b": null}',
            '{"a"',
        ),
        ({"type": "string", "minLength": 3000}, f'"{"a" * 3000}"', '""'),
        ({"type": "array", "maxItems": 0}, "[]", "[1]"),
        ({"type": ["string", "string"]}, '"a"', "1"),
    ],
    ids=lambda value: repr(value)[:80],
)
def test_odd_schemas_that_can_be_matched(
    pool: Pool, tokenizer: tokenizers.Tokenizer, value: object, good: str, bad: str
):
    matcher = pool.outcome(schema(value))
    assert accepts(matcher, tokenizer, good)
    assert not accepts(matcher, tokenizer, bad)


def test_what_would_crash_the_process_is_refused_and_the_next_grammar_compiles(pool: Pool):
    links = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(4000)}
    deep = schema({"$defs": {**links, "d4000": {}}, "$ref": "#/$defs/d0"})
    outcomes = pool.outcomes(deep, regex("after it"))
    assert "nests too deep" in outcomes["r0"].message
    assert isinstance(outcomes["r1"], Matcher)


def test_a_grammar_is_compiled_once_and_each_request_has_its_own_matcher(pool: Pool, tokenizer: tokenizers.Tokenizer):
    before = pool.wakes
    first, second = pool.outcomes(regex("once[0-9]"), regex("once[0-9]")).values()
    third = pool.outcome(regex("once[0-9]"))
    assert pool.wakes == before + 1
    for token in tokenizer.encode("once").ids:
        assert first.advance(token) is None
    assert all(accepts(matcher, tokenizer, "once1") for matcher in (second, third))
    assert accepts(first, tokenizer, "1")
    failures = pool.outcomes(regex("(b"), regex("(b"))
    assert [failure.param for failure in failures.values()] == ["regex", "regex"]
    assert pool.wakes == before + 2


def test_the_cache_is_bounded_and_drops_what_was_not_used_for_longest(pool: Pool):
    pool.outcomes(regex("oldest"), regex("kept"))
    for i in range(15):
        pool.outcomes(regex(f"filler{i}"), regex("kept"))
    before = pool.wakes
    pool.outcome(regex("kept"))
    assert pool.wakes == before
    pool.outcome(regex("oldest"))
    assert pool.wakes == before + 1


COUNTED = regex(r"\p{L}{1,20000}")  # some twenty states at each position


def write(pool: Pool, request: Request, tokens: list[int]) -> Failure | None:
    """What makes the matcher give up, one token after the other."""
    for token in tokens:
        pool.pool.fill([(0, request)])()
        if failure := request.matcher.failure() or request.matcher.advance(token):
            return failure
        request.generated.append(token)
    return None


def held(made: Matcher | Failure) -> Request:
    assert isinstance(made, Matcher), made
    return Request(Generate("r0", [1], SamplingParams(max_tokens=9, grammar=COUNTED)), 1, 9, (), made)


@pytest.mark.parametrize("grammar", [COUNTED, msgspec.structs.replace(COUNTED, calls=regex("[a-z]+!"))])
def test_a_long_text_goes_on_when_its_lexer_is_full_and_so_do_others_that_share_it(pool, tokenizer, grammar):
    first, second = (held(pool.outcome(grammar)) for _ in range(2))
    letter = tokenizer.token_to_id("a")
    assert write(pool, second, [letter]) is None
    assert write(pool, first, [letter] * 8000) is None, "several times what one lexer holds"
    assert write(pool, second, [letter] * 200) is None
    assert second.matcher.advance(tokenizer.token_to_id("1")).param == "regex", "it still knows where it is"
    assert write(pool, first, [letter] * 20) is None


def test_a_grammar_that_takes_long_to_compile_is_not_compiled_again_in_a_step(pool, tokenizer, monkeypatch):
    monkeypatch.setattr("ramet.scheduler.grammar._RENEWABLE_S", 0.0)
    costly = load_tokenizer(pool.folder, tokenizer.get_vocab_size() + 37, [EOS_ID])
    failure = write(pool, held(Matcher(costly, COUNTED)), [tokenizer.token_to_id("a")] * 8000)
    assert failure is not None and "too many states" in failure.message


def test_a_lexer_that_fills_up_at_once_ends_its_request(pool, tokenizer, monkeypatch):
    monkeypatch.setattr("ramet.scheduler.grammar._MAX_LEXER_STATES", 250)
    request = held(Matcher(load_tokenizer(pool.folder, tokenizer.get_vocab_size() + 37, [EOS_ID]), COUNTED))
    failure = write(pool, request, [tokenizer.token_to_id("a")] * 8000)
    assert failure is not None and "too many states" in failure.message
    assert len(request.generated) < 250


def test_a_held_request_can_be_taken_back(pool: Pool):
    pool.hold(regex("taken[0-9]"), regex("taken[a-z]"), regex("taken"))
    assert [message.rid for message in pool.pool.take_held(["r1", "r2", "unknown"])] == ["r1", "r2"]
    assert len(pool.pool.held_rids) == 1
    assert set(pool.outcomes()) == {"r0"}


def test_a_tokenizer_that_cannot_be_read_is_said_to_be(tmp_path):
    pool = Pool(str(tmp_path), 100)
    try:
        failure = pool.outcome(regex("a"))
        assert failure.param == "regex" and "tokenizer" in failure.message
    finally:
        pool.pool.close()


# ---- reasoning, calls --------------------------------------------------------------------------------------------

TAGS = Thought("<think>", "</think>")
OPENED = Thought("<think>", "</think>", opened=True)
PERSON = schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
CALL = Grammar(GrammarKind.LARK, """start: "{\\"name\\": \\"f\\", \\"arguments\\": {" /[a-z]/ "}}\"""", "tools")
TEXTS = ['{"name": "f"}', '{"name": "f", "arguments": {x}}']


@pytest.fixture(scope="module", params=["spelled", "added", "special"])
def tagged(request: pytest.FixtureRequest, tokenizer: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, object]:
    """A tokenizer whose tags are tokens of their own, or are not; and llguidance's of it."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    if request.param != "spelled":
        (copy.add_special_tokens if request.param == "special" else copy.add_tokens)(["<think>", "</think>"])
        assert len(copy.encode("</think>").ids) == 1
    return copy, llguidance.LLTokenizer(copy.to_str(), eos_token=EOS_ID)


def walk(tagged: tuple[tokenizers.Tokenizer, object], grammar: Grammar, text: str) -> bool:
    """Whether the masks allow each token of the text, and then its end, and at no earlier place."""
    own, ll_tokenizer = tagged
    matcher = Matcher(ll_tokenizer, grammar)
    bits = np.empty(-(-ll_tokenizer.vocab_size // 32), dtype=np.uint32)

    def allows(token: int) -> bool:
        matcher.fill(bits)
        return bool(bits[token // 32] >> np.uint32(token % 32) & 1)

    for token in own.encode(text, add_special_tokens=False).ids:
        if allows(EOS_ID) or not allows(token):
            return False
        assert matcher.advance(token) is None
    if not allows(EOS_ID):
        return False
    assert matcher.advance(EOS_ID) is None, "an end that one of several ways allows"
    return True


def with_ways(grammar: Grammar, *, calls: Grammar | None = None, thought: Thought | None = None) -> Grammar:
    return msgspec.structs.replace(grammar, calls=calls, thought=thought)


@pytest.mark.parametrize("calls", [None, CALL], ids=["", "calls"])
@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        (PERSON, TEXTS),
        (regex("[0-9]{2}"), ["12", TEXTS[1]]),
        (Grammar(GrammarKind.EBNF, 'root ::= "{" [0-9] "}"', "ebnf"), ["{1}", TEXTS[1]]),
        (Grammar(GrammarKind.EBNF, 'start: "{" A "}"\nA: /[0-9]/\n%ignore / +/', "ebnf"), ["{ 1 }", TEXTS[1]]),
        (Grammar(GrammarKind.LARK, 'start: "<tool_call>" answer\nanswer: "x"', "x"), ["<tool_call>x", TEXTS[1]]),
    ],
    ids=["schema", "regex", "gbnf", "ignores", "lark"],
)
def test_reasoning_may_come_first_and_calls_instead(tagged, grammar, texts, calls):
    plain, optional, opened = (with_ways(grammar, calls=calls, thought=how) for how in (None, TAGS, OPENED))
    for text in texts[: 1 if calls is None else 2]:
        for thought in ("</think>", "a < b </thin>\n{é}</think>\n\n"):
            assert walk(tagged, plain, text)
            assert walk(tagged, optional, text)
            assert walk(tagged, optional, f"<think>{thought}{text}")
            assert walk(tagged, opened, f"{thought}{text}")
            assert not walk(tagged, plain, f"<think>{thought}{text}")
            assert not walk(tagged, opened, text), "the block must be closed"
            assert not walk(tagged, optional, f"{thought}{text}")
            assert not walk(tagged, optional, f"<think>{thought}{thought}{text}"), "there is one block"
            assert not walk(tagged, optional, f"<think>{thought}Well: {text}")


def test_an_end_tag_that_is_a_token_is_not_spelled(tagged):
    own, ll_tokenizer = tagged
    matcher = Matcher(ll_tokenizer, with_ways(PERSON, thought=OPENED))
    for token in own.encode("a</think").ids:
        assert matcher.advance(token) is None
    failure = matcher.advance(own.token_to_id(">"))
    assert (failure is None) == (len(own.encode("</think>").ids) > 1)


def test_the_part_at_fault_is_named(pool: Pool):
    bad_call = Grammar(GrammarKind.LARK, "start: zap", "tools")
    nothing = Grammar(GrammarKind.EBNF, "root ::= root", "ebnf")
    outcomes = pool.outcomes(
        with_ways(PERSON, calls=bad_call),
        with_ways(schema({"not": {}}), calls=CALL, thought=TAGS),
        with_ways(nothing, calls=CALL),
        with_ways(nothing, thought=OPENED),
        with_ways(PERSON, calls=regex("x" * (MAX_SOURCE_CHARS + 1))),
    )
    assert [made.param for made in outcomes.values()] == ["tools", "response_format", "ebnf", "ebnf", "regex"]
    assert all(made.message.startswith(f"{made.param}: ") for made in outcomes.values())


# ---- with a model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_engine(tiny_model):
    torch.set_num_threads(1)
    engines: list[InlineEngine] = []

    def make(**settings) -> InlineEngine:
        engines.append(InlineEngine(tiny_model("llama"), eos_ids=(EOS_ID,), **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.grammars.close()


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (regex("([a-f][0-9]){15}"), "([a-f][0-9]){15}"),
        (
            with_ways(regex("([a-f][0-9]){5}"), calls=regex("x[a-f]{5}"), thought=Thought("(", "e", opened=True)),
            "(?s)[^e]+e[ \n]{0,2}(([a-f][0-9]){5}|x[a-f]{5})",
        ),
    ],
    ids=["plain", "behind reasoning"],
)
def test_a_constrained_request_is_the_same_alone_among_others_and_after_a_preemption(
    make_engine, tokenizer, grammar, pattern
):
    def run(total_tokens: int, others: int) -> tuple[str, int]:
        engine = make_engine(total_tokens=total_tokens, max_running=24)
        for i in range(others):
            engine.add(f"other{i}", [(7 * i + j) % 300 for j in range(5 + i)], 40, ignore_eos=True)
        engine.add("own", PROMPT, 40, temperature=1.0, seed=1234, grammar=grammar)
        engine.run()
        assert engine.outputs["own"][-1].finish.reason is FinishReason.STOP
        return tokenizer.decode(engine.tokens["own"]), engine.core.counters.preemptions

    alone, _ = run(1024, 0)
    among, _ = run(2048, 16)
    squeezed, preemptions = run(160, 4)
    assert re.fullmatch(pattern, alone) and alone == among
    assert preemptions > 0 and alone == squeezed


def test_many_constrained_rows_in_one_step(make_engine, tokenizer):
    engine = make_engine(max_running=16)
    for i in range(12):
        engine.add(f"r{i}", PROMPT, 30, temperature=1.0, seed=i, grammar=regex(f"{i}[a-z]{{{i + 1}}}"))
    engine.run()
    for i in range(12):
        text = tokenizer.decode(engine.tokens[f"r{i}"])
        assert text.startswith(str(i)) and len(text) == len(str(i)) + i + 1


@pytest.mark.parametrize(
    ("pattern", "params", "length", "reason", "matched"),
    [
        ("a{3}", {}, 3, FinishReason.STOP, None),
        ("a{3}", {"min_tokens": 20}, 3, FinishReason.STOP, None),
        ("a{0,30}", {"logit_bias": {EOS_ID: 100}}, 0, FinishReason.STOP, EOS_ID),
        ("a{4,30}", {"logit_bias": {EOS_ID: 100}}, 4, FinishReason.STOP, EOS_ID),
        ("a{4,30}", {"logit_bias": {EOS_ID: 100}, "min_tokens": 6}, 6, FinishReason.STOP, EOS_ID),
        ("a{4,12}", {"logit_bias": {EOS_ID: 100}, "ignore_eos": True}, 12, FinishReason.STOP, None),
        ("a{3,30}", {"ignore_eos": True}, 20, FinishReason.LENGTH, None),
        ("b{20}", {}, 20, FinishReason.STOP, None),
    ],
)
def test_the_ways_to_end(make_engine, tokenizer, pattern, params, length, reason, matched):
    """Only single letters are allowed, so that a token is a letter."""
    engine = make_engine()
    letters = [i for i in range(tokenizer.get_vocab_size()) if set(tokenizer.decode([i])) <= set("ab")]
    bans = {i: -100.0 for i in letters if len(tokenizer.decode([i])) > 1}
    bias = {**bans, **params.pop("logit_bias", {})}
    engine.add("r", PROMPT, 20, grammar=regex(pattern), logit_bias=bias, **params)
    engine.run()
    assert len(tokenizer.decode(engine.tokens["r"])) == length
    assert engine.outputs["r"][-1].finish.reason is reason
    assert engine.outputs["r"][-1].finish.matched == matched


def test_reasoning_that_does_not_end_takes_what_there_is(make_engine, tokenizer):
    """Its text may be anything but the end of the answer."""
    engine = make_engine()
    grammar = with_ways(regex("[0-9]"), thought=OPENED)
    engine.add("r", PROMPT, 20, grammar=grammar, logit_bias={EOS_ID: 100.0}, temperature=1.0)
    engine.run()
    assert EOS_ID not in engine.tokens["r"]
    assert engine.outputs["r"][-1].finish.reason is FinishReason.LENGTH


def test_a_stop_token_ends_an_unfinished_answer(make_engine, tokenizer):
    engine, stop = make_engine(), tokenizer.token_to_id("b")
    engine.add("r", PROMPT, 20, grammar=regex("aab{9}"), stop_token_ids=(stop,))
    engine.run()
    assert engine.outputs["r"][-1].finish.matched == stop


def test_a_matcher_that_gives_up_and_bans_that_leave_nothing_fail_their_request_alone(make_engine, tokenizer):
    engine = make_engine()
    engine.add("broken", PROMPT, 20, grammar=regex("a+"))
    engine.add("banned", PROMPT, 20, grammar=regex("b+"), logit_bias=dict.fromkeys(range(300), -100.0), min_tokens=1)
    engine.add("well", PROMPT, 20, grammar=regex("c{5}"))
    outputs = {}
    while (plan := engine.core.schedule()) is not None:
        constrained = engine.core.constrained(plan)
        for _, request in constrained:
            if request.rid == "broken" and len(request.generated) == 2:
                request.matcher.advance(tokenizer.token_to_id("z"))
        engine.core.commit(plan, engine.runner.execute(plan, engine.grammars.fill(constrained)))
        outputs |= {out.rid: out for out in engine.core.take_outputs() if out.failure or out.finish}
    assert (outputs["broken"].failure.kind, outputs["broken"].failure.param) == (FailureKind.INVALID_REQUEST, "regex")
    assert "banned" in outputs["banned"].failure.message
    assert outputs["well"].finish.reason is FinishReason.STOP


class Panicking:
    """A matcher that fails as one in Rust may: with what is no Exception."""

    def fill(self, _: np.ndarray) -> bool:
        raise BaseException("a panic in Rust")

    def failure(self) -> None:
        return None


def test_a_matcher_that_panics_fails_its_request_alone(make_engine, caplog):
    engine = make_engine()
    engine.add("panics", PROMPT, 20, grammar=regex("a+"))
    engine.add("well", PROMPT, 20, grammar=regex("c{5}"))
    engine.add("free", PROMPT, 20)
    outputs = {}
    while (plan := engine.core.schedule()) is not None:
        constrained = engine.core.constrained(plan)
        for _, request in constrained:
            if request.rid == "panics" and len(request.generated) == 2:
                request.matcher = Panicking()
        masks = engine.grammars.fill(constrained) if constrained else None
        engine.core.commit(plan, engine.runner.execute(plan, masks))
        outputs |= {out.rid: out for out in engine.core.take_outputs() if out.failure or out.finish}
    assert "no token" in outputs["panics"].failure.message or "banned" in outputs["panics"].failure.message
    assert outputs["well"].finish.reason is FinishReason.STOP
    assert outputs["free"].finish.reason is FinishReason.LENGTH
    assert "a panic in Rust" in caplog.text


def test_logprobs_are_of_the_raw_logits(make_engine):
    engine = make_engine()
    engine.add("free", PROMPT, 1, logprobs=5)
    engine.add("bound", PROMPT, 1, logprobs=5, grammar=regex("[0-9]"))
    engine.run()
    [free], [bound] = engine.outputs["free"][0].logprobs, engine.outputs["bound"][0].logprobs
    assert bound.top_ids == free.top_ids
    assert np.allclose(bound.top_logprobs, free.top_logprobs)
    assert bound.token_id not in bound.top_ids and bound.logprob < free.top_logprobs[-1]
