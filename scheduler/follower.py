"""The process of a tensor-parallel rank other than 0: it executes the plans that rank 0 sends, and decides nothing.

Tokens are chosen by rank 0 alone: the next plan carries them. Whatever goes wrong ends the process, and with it the
engine's scheduler.
"""

import logging

from ramet.ipc.channel import Addresses, Outbox
from ramet.ipc.messages import Fatal, Progress, Ready
from ramet.ipc.ranks import Execute
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.runner import ModelRunner
from ramet.scheduler.config import TpConfig
from ramet.scheduler.ranks import SETUP_ERRORS, join

log = logging.getLogger(__name__)


def run(config: TpConfig, runner_config: RunnerConfig, addresses: Addresses) -> None:
    """Follow until the process is told to stop. Raises PeerLost when rank 0 is gone."""
    name = f"scheduler-{config.rank}"
    launcher = Outbox(addresses.launcher)

    def progress(text: str) -> None:
        launcher.send(Progress(name, text))

    try:
        link, group = join(config, runner_config, progress)
        runner = ModelRunner(runner_config, progress, group)
    except SETUP_ERRORS as error:
        log.debug("set-up failed", exc_info=True)
        launcher.send(Fatal(name, str(error)))
        launcher.close()
        raise SystemExit(1) from error
    launcher.send(Ready(name))
    while True:
        if isinstance(message := link.receive(), Execute):
            runner.execute(message.plan)
