"""`GrammarPool`: compiles grammars off the scheduling loop, holds requests meanwhile, and fills masks.

Owns llguidance's tokenizer, a bounded cache of compiled grammars and the threads; used by the scheduling loop alone.
Each request gets a copy. A grammar whose lexer was full is compiled anew for those that come later. Every one is first
tried in a process of its own (`scheduler/grammar_checker.py`), since a few hostile characters can cost minutes,
gigabytes, or more stack than there is. Does not know sockets or torch.
"""

import logging
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import msgspec
import numpy as np
from llguidance import LLTokenizer

from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.messages import Generate
from ramet.ipc.sampling import Grammar
from ramet.ipc.step import TokenMasks
from ramet.scheduler.config import SchedulerConfig
from ramet.scheduler.grammar import GrammarError, Matcher, load_tokenizer, refusal
from ramet.scheduler.grammar_checker import CPU_LIMIT_S, MEMORY_LIMIT_BYTES
from ramet.scheduler.request import Request

logger = logging.getLogger(__name__)

_CACHED_GRAMMARS = 16  # up to 40 MiB each, if somebody fills their lexers
_MASK_THREADS = 4


class _Held(NamedTuple):
    message: Generate
    compiled: "Future[Matcher | Failure]"


class GrammarPool:
    """`on_ready` is called from one thread, always the same, when a grammar was compiled or refused."""

    def __init__(self, config: SchedulerConfig, vocab_size: int, on_ready: Callable[[], None]) -> None:
        self._tokenizer_dir = config.tokenizer_dir
        self._vocab_size = vocab_size
        self._eos_ids = [i for i in config.eos_ids if i < vocab_size]
        self._on_ready = on_ready
        self._compiler = ThreadPoolExecutor(1, "grammars")  # one thread: it owns what follows, and keeps the order
        self._tokenizer: LLTokenizer | None = None
        self._checker: subprocess.Popen[bytes] | None = None
        self._fillers = ThreadPoolExecutor(_MASK_THREADS, "masks")
        self._cache: dict[Grammar, Future[Matcher | Failure]] = {}  # the last used at the end
        self._held: list[_Held] = []

    @property
    def held_rids(self) -> list[str]:
        return [held.message.rid for held in self._held]

    def hold(self, message: Generate) -> None:
        """Keep a request until `take_ready` gives it back."""
        assert message.params.grammar is not None
        self._held.append(_Held(message, self._compiled(message.params.grammar)))

    def take_held(self, rids: list[str]) -> list[Generate]:
        """Give up those of the requests that are held."""
        taken = [held.message for held in self._held if held.message.rid in rids]
        self._held = [held for held in self._held if held.message.rid not in rids]
        return taken

    def take_ready(self) -> list[tuple[Generate, Matcher | Failure]]:
        """Requests whose grammar is compiled or refused, each with a matcher of its own or what to answer."""
        held, self._held = self._held, []
        ready: list[_Held] = []
        for each in held:
            # Asked once: it may become so at any moment.
            (ready if each.compiled.done() else self._held).append(each)
        return [(message, self._outcome(message, compiled)) for message, compiled in ready]

    def fill(self, rows: list[tuple[int, Request]]) -> Callable[[], TokenMasks]:
        """Start to compute the masks of these rows, in threads; the call that is returned waits for them."""
        bits = np.empty((len(rows), -(-self._vocab_size // 32)), dtype=np.uint32)
        fills = [self._fillers.submit(self._fill, request, bits[i]) for i, (_, request) in enumerate(rows)]

        def wait() -> TokenMasks:
            for fill, (_, request) in zip(fills, rows, strict=True):
                if fill.result() and (grammar := request.params.grammar):
                    self._cache.pop(grammar, None)
            return TokenMasks([row for row, _ in rows], bits)

        return wait

    def close(self) -> None:
        self._compiler.shutdown()
        self._fillers.shutdown()
        self._end_checker()

    def _fill(self, request: Request, bits: np.ndarray) -> bool:
        """Whether the lexer was full."""
        assert request.matcher is not None
        try:
            was_full = request.matcher.fill(bits)
        except BaseException:  # a panic in Rust is no Exception
            logger.exception("the mask of request %s could not be computed", request.rid)
            bits[:], was_full = 0, False  # no token is allowed: this row fails alone
        if request.params.ignore_eos:
            for token in self._eos_ids:
                bits[token // 32] &= ~np.uint32(1 << token % 32)
        return was_full

    def _outcome(self, message: Generate, compiled: "Future[Matcher | Failure]") -> Matcher | Failure:
        grammar = message.params.grammar
        assert grammar is not None
        error = compiled.exception()
        if error is None:
            made = compiled.result()
            return made if isinstance(made, Failure) else made.copy()
        logger.error("a grammar could not be compiled", exc_info=error)
        self._cache.pop(grammar, None)  # it may go better the next time
        return Failure(FailureKind.INTERNAL, f"the grammar could not be compiled: {error}")

    def _compiled(self, grammar: Grammar) -> "Future[Matcher | Failure]":
        """From the cache; or under way, with the word of it to follow."""
        if (compiled := self._cache.pop(grammar, None)) is None:
            compiled = self._compiler.submit(self._compile, grammar)
            self._compiler.submit(self._on_ready)
        self._cache[grammar] = compiled
        if len(self._cache) > _CACHED_GRAMMARS:
            del self._cache[next(iter(self._cache))]
        return compiled

    def _compile(self, grammar: Grammar) -> Matcher | Failure:
        tried = grammar
        try:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._tokenizer_dir, self._vocab_size, self._eos_ids)
            for tried in dict.fromkeys((*grammar.parts, grammar)):  # the parts by themselves, to name the one at fault
                self._check(tried)
            return Matcher(self._tokenizer, grammar)
        except GrammarError as error:
            return refusal(tried, str(error))

    def _check(self, grammar: Grammar) -> None:
        """Let the other process try. If that ends it, the next grammar gets a new one."""
        if self._checker is None:
            command = [sys.executable, "-m", "ramet.scheduler.grammar_checker", self._tokenizer_dir]
            self._checker = subprocess.Popen(
                [*command, *map(str, (self._vocab_size, *self._eos_ids))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert self._checker.stdin is not None and self._checker.stdout is not None
        try:
            self._checker.stdin.write(msgspec.json.encode(grammar) + b"\n")
            self._checker.stdin.flush()
            answer = self._checker.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            self._end_checker()
            raise GrammarError(
                f"too complex: compiling it took more than {CPU_LIMIT_S} s of CPU time or "
                f"{MEMORY_LIMIT_BYTES // 1024**2} MiB of memory, or it nests too deep"
            )
        if words := msgspec.json.decode(answer, type=str):
            raise GrammarError(words)

    def _end_checker(self) -> None:
        checker, self._checker = self._checker, None
        if checker is not None:
            checker.kill()
            checker.communicate()
