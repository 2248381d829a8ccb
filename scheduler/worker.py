"""The scheduler process: rank 0's loop around the pure core and the model runner.

Takes messages, plans, executes, commits, sends news; blocks on its inbox when there is no work. Owns no decision.
"""

import time

from ramet.ipc.channel import DETOKENIZER, FRONTEND, SCHEDULER, Addresses, Inbox, Outbox
from ramet.ipc.errors import Failure, FailureKind
from ramet.ipc.messages import Abort, Embed, Failed, FlushCache, Flushed, Generate, Reset, TokenBatch, ToScheduler, Wake
from ramet.ipc.pulse import BEAT_S, Pulse
from ramet.ipc.ranks import Ping
from ramet.ipc.start import Startup
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.runner import ModelRunner
from ramet.scheduler.config import SchedulerConfig
from ramet.scheduler.core import SchedulerCore
from ramet.scheduler.grammar_pool import GrammarPool
from ramet.scheduler.pipeline import Pipeline
from ramet.scheduler.ranks import SETUP_ERRORS, lead
from ramet.scheduler.stats import StatsReporter

# How long messages may be taken between two steps: a prompt of 20,000 tokens takes 0.7 ms. After a long step more are
# due, or aborts would wait for many steps.
_INTAKE_S, _INTAKE_SHARE = 0.003, 0.1


def run(config: SchedulerConfig, runner_config: RunnerConfig, addresses: Addresses) -> None:
    """Serve until the process is told to stop. Exits with status 1 if the model cannot be set up."""
    Worker(config, runner_config, addresses).loop()


class Worker:
    """The loop's state: the core, the runner, and the way to the detokenizer and the frontend."""

    def __init__(self, config: SchedulerConfig, runner_config: RunnerConfig, addresses: Addresses) -> None:
        startup = Startup(SCHEDULER, addresses)
        self._inbox: Inbox[ToScheduler] = Inbox(addresses.inbox(SCHEDULER), ToScheduler)
        with startup.failing_with(*SETUP_ERRORS):
            ranks = lead(config.tp, runner_config, startup.progress) if config.tp.size > 1 else None
            runner = ModelRunner(runner_config, startup.progress, ranks.group if ranks else None)
            self._core = core = SchedulerCore(config, runner.num_pages)
        self._distant_ranks = ranks if config.tp.host else None  # the launcher watches those on this machine
        self._detokenizer = Outbox(addresses.inbox(DETOKENIZER))
        self._frontend = Outbox(addresses.inbox(FRONTEND))
        self._pulse = Pulse(addresses, SCHEDULER, runner.warm_up_s)
        own_inbox = Outbox(addresses.inbox(SCHEDULER))
        self._grammars = GrammarPool(config, runner.vocab_size, lambda: own_inbox.send(Wake()))
        self._stats = StatsReporter(self._frontend.send, core.counters)
        tell_ranks = ranks.send if ranks else None
        self._pipeline = Pipeline(core, runner, config.steps_ahead, self._grammars.fill, tell_ranks, self._stats.add)
        self._taken_s = time.monotonic()
        capacity = runner.num_pages * config.page_size
        startup.ready(kv_tokens=capacity, context_length=min(config.context_length, capacity))

    def loop(self) -> None:
        while True:
            self._pulse.beat()
            self._take_messages()
            if not (ended := self._pipeline.turn()) and self._distant_ranks is not None:
                self._distant_ranks.send(Ping())  # raises if one is gone
            outputs = self._core.take_outputs()
            if outputs:
                self._detokenizer.send(TokenBatch(outputs))
            if ended or outputs:
                self._report()

    def _take_messages(self) -> None:
        """What has come, in its order, for as long as those that decode may wait; the rest waits for the next turn, so
        that messages which come faster than they are taken hold up no step. Waits for the first if there is no work."""
        intake_s = max(_INTAKE_S, _INTAKE_SHARE * (time.monotonic() - self._taken_s))
        message = self._inbox.receive(0.0 if self._core.has_work else BEAT_S)
        until_s = time.monotonic() + intake_s
        while message is not None:
            self._take(message)
            message = self._inbox.receive(0.0) if time.monotonic() < until_s else None
        for request, made in self._grammars.take_ready():
            if isinstance(made, Failure):
                self._core.refuse(request.rid, made)
            else:
                self._core.add(request, made)
        self._taken_s = time.monotonic()

    def _take(self, message: ToScheduler) -> None:
        match message:  # what `Wake` is for has happened by its coming
            case Generate() if message.params.grammar is not None:
                self._grammars.hold(message)
            case Generate():
                self._core.add(message)
            case Abort():
                self._abort(message.rids)
            case Reset():
                self._abort([*self._grammars.held_rids, *self._core.rids])
                self._core.take_outputs()  # nobody waits for their ends
                self._report()
                self._detokenizer.send(message)
            case FlushCache():
                self._frontend.send(Flushed(message.rid, self._core.kv.flush()))
            case Embed():
                words = "this server generates text: to embed, start one with --is-embedding"
                self._frontend.send(Failed([message.rid], Failure(FailureKind.INVALID_REQUEST, words)))

    def _abort(self, rids: list[str]) -> None:
        for held in self._grammars.take_held(rids):
            self._core.add(held)
        self._core.abort(rids)

    def _report(self) -> None:
        core, kv = self._core, self._core.kv
        if self._stats.is_due(core.has_work):
            self._stats.send(
                core.num_running,
                core.num_waiting + len(self._grammars.held_rids),
                pages_total=kv.allocator.num_pages,
                pages_free=kv.allocator.num_free,
                pages_cached=kv.cache.num_pages,
            )
