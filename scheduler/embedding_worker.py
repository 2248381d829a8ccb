"""The scheduler process of a server that embeds: the loop around `EmbeddingQueue` and the model.

Takes messages, runs a step, answers the frontend directly; blocks on its inbox when there is no work. A prompt that
breaks a step fails alone: the others of that step are run again by themselves.
"""

import logging
import time

from ramet.ipc.channel import FRONTEND, SCHEDULER, Addresses, Inbox, Outbox
from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.messages import Abort, Embed, Embedded, Failed, FlushCache, Flushed, Generate, Reset, ToScheduler
from ramet.ipc.pulse import BEAT_S, Pulse
from ramet.ipc.start import Startup
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.embedder import Embedder
from ramet.model_runner.weights.errors import WeightsError
from ramet.scheduler.config import SchedulerConfig
from ramet.scheduler.embedding import EmbeddingQueue
from ramet.scheduler.stats import StatsReporter

logger = logging.getLogger(__name__)

_NO_GENERATION = Failure(FailureKind.INVALID_REQUEST, "this server embeds; one without --is-embedding generates")


def run(config: SchedulerConfig, runner_config: RunnerConfig, addresses: Addresses) -> None:
    """Serve until the process is told to stop. Exits with status 1 if the model cannot be set up."""
    startup = Startup(SCHEDULER, addresses)
    inbox: Inbox[ToScheduler] = Inbox(addresses.inbox(SCHEDULER), ToScheduler)
    with startup.failing_with(WeightsError, ValueError):
        embedder = Embedder(runner_config, startup.progress)
    pulse = Pulse(addresses, SCHEDULER, embedder.warm_up_s)
    startup.ready(context_length=config.context_length, embedding_size=embedder.embedding_size)
    queue = EmbeddingQueue(config.max_step_tokens, config.max_running)
    worker = EmbeddingWorker(queue, embedder, inbox, Outbox(addresses.inbox(FRONTEND)))
    while True:
        pulse.beat()
        if worker.take_messages():
            worker.step()


class EmbeddingWorker:
    """The loop's state: the queue, the model, and the way to the frontend."""

    def __init__(
        self, queue: EmbeddingQueue, embedder: Embedder, inbox: "Inbox[ToScheduler]", frontend: Outbox
    ) -> None:
        self._queue = queue
        self._embedder = embedder
        self._inbox = inbox
        self._frontend = frontend
        self._stats = StatsReporter(frontend.send, queue.counters)

    def take_messages(self) -> bool:
        """Everything that has come; waits a while for something if there is no work. False if nothing came."""
        busy = bool(self._queue)
        timeout_s = 0.0 if busy else BEAT_S
        while (message := self._inbox.receive(timeout_s)) is not None:
            busy = True
            match message:
                case Embed():
                    self._queue.add(message)
                case Abort():
                    self._queue.abort(message.rids)
                case Reset():
                    self._queue.abort(self._queue.rids)
                    self._stats.send(0, 0)
                    self._frontend.send(message)
                case FlushCache():
                    self._frontend.send(Flushed(message.rid, 0))
                case Generate():
                    self._frontend.send(Failed([message.rid], _NO_GENERATION))
            timeout_s = 0.0
        return busy

    def step(self) -> None:
        """Counters are sent before the answers that they count, so that who has an answer finds it counted."""
        begun = time.monotonic()
        step = self._queue.take_step()
        if self._stats.is_due(busy=True):
            self._stats.send(len(step), len(self._queue))
        answers: list[Embedded | Failed] = []
        if step:
            planned = time.monotonic()
            answers = self._embed(step)
            self._stats.add(begun, planned, time.monotonic(), len(step))
        if not self._queue:
            self._stats.send(0, 0)
        for answer in answers:
            self._frontend.send(answer)

    def _embed(self, step: list[Embed]) -> list[Embedded | Failed]:
        try:
            vectors = self._embedder.execute([message.prompt_ids for message in step])
        # Whatever goes wrong ends one request, not the server.
        except Exception as error:
            if len(step) > 1:
                logger.warning("a step of %d prompts failed (%s): they are run one by one", len(step), error)
                return [answer for message in step for answer in self._embed([message])]
            logger.exception("a prompt of %d tokens could not be embedded", len(step[0].prompt_ids))
            return [self._failed(step[0], f"the model step failed: {error}")]
        return [self._answer(message, vector) for message, vector in zip(step, vectors, strict=True)]

    def _answer(self, message: Embed, vector: bytes | None) -> Embedded | Failed:
        if vector is None:
            return self._failed(message, "the embedding is not finite")
        self._queue.finish(message)
        return Embedded(message.rid, len(message.prompt_ids), vector)

    def _failed(self, message: Embed, words: str) -> Failed:
        self._queue.fail()
        return Failed([message.rid], Failure(FailureKind.INTERNAL, words))
