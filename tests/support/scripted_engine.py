"""A real frontend process with a scripted engine behind it, over the real sockets.

A thread reads the inboxes of the tokenizer workers and of the launcher. What an engine would answer is either a
`script`, called in that thread for each job, or done by the test, which takes jobs from a queue and sends what it
likes in the order it likes.
"""

import functools
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ramet.frontend.config import FrontendConfig
from ramet.ipc.channel import FRONTEND, LAUNCHER, TOKENIZER, Addresses, Inbox, Outbox
from ramet.ipc.errors import Failure
from ramet.ipc.messages import (
    Abort,
    Chat,
    Completion,
    EngineUp,
    Failed,
    Fatal,
    Finish,
    FinishReason,
    Message,
    PromptInfo,
    Ready,
    Reset,
    TextBatch,
    TextDelta,
    TokenText,
    ToLauncher,
    ToTokenizer,
)
from ramet.launch.child import die_with_parent

MODEL = "tiny/model"
WAIT_S = 60.0
_PROCESS = """
import sys, msgspec
from ramet.frontend.config import FrontendConfig
from ramet.frontend.main import run
from ramet.ipc.channel import Addresses
run(msgspec.json.decode(sys.argv[1], type=FrontendConfig), msgspec.json.decode(sys.argv[2], type=Addresses))
"""

Request = Chat | Completion
Script = Callable[["ScriptedEngine", Request], None]


class ScriptedEngine:
    """`with ScriptedEngine() as engine:` runs until the block ends; `engine.url` is where the frontend serves."""

    def __init__(self, *, tokenizers: int = 1, start: bool = True, **config: Any) -> None:
        self._addresses = Addresses(tempfile.mkdtemp(prefix="ramet-test-"), tokenizers)
        self._stderr = Path(self._addresses.folder, "stderr")
        defaults: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": 0,
            "served_names": (MODEL, "alias"),
            "model_path": "/models/tiny",
            "context_length": 512,
            "vocab_size": 1000,
            "file_storage_path": f"{self._addresses.folder}/store",
        }
        self.config = FrontendConfig(**{**defaults, **config})
        self.jobs: queue.Queue[Request] = queue.Queue()
        self._workers: dict[str, int] = {}
        self.questions: queue.Queue[Any] = queue.Queue()
        self.aborts: queue.Queue[tuple[int, Abort]] = queue.Queue()
        self.news: queue.Queue[Ready | Fatal] = queue.Queue()
        self.script: Script | None = None
        self.url = ""
        self._start = start
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> "ScriptedEngine":
        folder = self._addresses
        self._tokenizers = [
            Inbox[Any](folder.inbox(TOKENIZER.format(i)), ToTokenizer) for i in range(folder.tokenizers)
        ]
        self._launcher = Inbox[Any](folder.inbox(LAUNCHER), ToLauncher)
        self._frontend = Outbox(folder.inbox(FRONTEND))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        arguments = [msgspec.json.encode(value).decode() for value in (self.config, folder)]
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROCESS, *arguments],
                stderr=stderr,
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )
        if self._start:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._closing.set()
        self._thread.join(WAIT_S)
        for channel in (*self._tokenizers, self._launcher, self._frontend):
            channel.close()
        shutil.rmtree(self._addresses.folder)

    def start(self, **info: int | str | float) -> None:
        """Tell the frontend that the engine is ready, and wait until it serves."""
        self.send(EngineUp(info))
        news = self.news.get(timeout=WAIT_S)
        assert isinstance(news, Ready), news
        self.url = f"http://127.0.0.1:{news.info['port']}"

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self) -> int:
        return self.process.wait(WAIT_S)

    def pulse(self, process: str) -> Path:
        return Path(self._addresses.pulse(process))

    def listens_for_messages(self) -> bool:
        return Path(self._addresses.inbox(FRONTEND)).exists()

    def errors(self) -> str:
        """What the process has written to stderr."""
        return self._stderr.read_text()

    def job(self) -> Request:
        return self.jobs.get(timeout=WAIT_S)

    def question(self) -> Any:
        """The next message that asks for one `Answer`."""
        return self.questions.get(timeout=WAIT_S)

    def tokenizer_of(self, request: Request) -> int:
        return self._workers[request.job.rids[0]]

    def aborted(self) -> list[str]:
        """The ids of the next abort."""
        return self.aborts.get(timeout=WAIT_S)[1].rids

    def send(self, message: Message) -> None:
        with self._lock:
            self._frontend.send(message)

    def deltas(self, *items: TextDelta) -> None:
        self.send(TextBatch(list(items)))

    def fail(self, request: Request, failure: Failure) -> None:
        self.send(Failed(list(request.job.rids), failure))

    def _read(self) -> None:
        while not self._closing.is_set():
            for number, inbox in enumerate(self._tokenizers):
                while (message := inbox.receive(0.002)) is not None:
                    if isinstance(message, Abort):
                        self.aborts.put((number, message))
                        continue
                    if isinstance(message, Reset):
                        self.send(message)
                        continue
                    if not isinstance(message, Request):
                        self.questions.put(message)
                        continue
                    self._workers[message.job.rids[0]] = number
                    self.jobs.put(message)
                    if self.script is not None:
                        self.script(self, message)
            while (news := self._launcher.receive(0)) is not None:
                self.news.put(news)


def says(*texts: str, matched: int | str | None = 2, prompt_tokens: int = 5, cached_tokens: int = 3) -> Script:
    """A script: every choice says these texts, one token each, and stops."""

    def script(engine: ScriptedEngine, request: Request) -> None:
        for step, text in enumerate(texts, 1):
            for rid in request.job.rids:
                prompt = PromptInfo(prompt_tokens, cached_tokens, "told" if request.job.echo else None)
                last = step == len(texts)
                engine.deltas(
                    TextDelta(
                        rid,
                        text,
                        step,
                        prompt=prompt if step == 1 else None,
                        finish=Finish(FinishReason.STOP, matched) if last else None,
                    )
                )

    return script


def token(text: str, logprob: float = -0.5, top: tuple[TokenText, ...] = ()) -> TokenText:
    return TokenText(text, text.encode(), logprob, list(top))


__all__ = ["MODEL", "WAIT_S", "Request", "ScriptedEngine", "says", "token"]
