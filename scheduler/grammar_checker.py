"""A process that compiles grammars for no other end than to see whether that goes well.

`python -m ramet.scheduler.grammar_checker TOKENIZER_DIR VOCAB_SIZE EOS_ID…` reads a grammar per line of JSON and writes
a line with what is wrong, empty if nothing is. A grammar that takes too much CPU time, memory or stack ends the
process, and that is an answer too. Ends with its parent.
"""

import ctypes
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import msgspec
from llguidance import LLTokenizer

from ramet.ipc.sampling import Grammar
from ramet.scheduler.grammar import GrammarError, compile_grammar, load_tokenizer

CPU_LIMIT_S = 5
MEMORY_LIMIT_BYTES = 512 * 1024**2
# Half of what the threads of the scheduler have: what passes here does not overflow there.
_STACK_BYTES = 4 * 1024**2
_PR_SET_PDEATHSIG = 1


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(10)
    tokenizer = load_tokenizer(sys.argv[1], int(sys.argv[2]), [int(i) for i in sys.argv[3:]])
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * _STACK_BYTES + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    threading.Thread(target=_serve, args=(tokenizer,)).start()


def _serve(tokenizer: LLTokenizer) -> None:
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)  # kills when it runs out
        try:
            compile_grammar(tokenizer, msgspec.json.decode(line, type=Grammar))
            words = ""
        except GrammarError as error:
            words = str(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(msgspec.json.encode(words) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
