"""The process of a tensor-parallel rank other than 0: it executes the plans that rank 0 sends, and decides nothing.

It keeps the tokens that a step chose, as rank 0 does, but reads no results, and so never waits for its device. Whatever
goes wrong ends the process, and with it the engine's scheduler.
"""

from ramet.ipc.channel import Addresses
from ramet.ipc.pulse import BEAT_S, Pulse
from ramet.ipc.start import Startup
from ramet.ipc.step import StepPlan
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.runner import ModelRunner
from ramet.scheduler.config import TpConfig
from ramet.scheduler.ranks import SETUP_ERRORS, join


def run(config: TpConfig, runner_config: RunnerConfig, addresses: Addresses) -> None:
    """Follow until the process is told to stop. Raises PeerLost when rank 0 is gone."""
    name = f"scheduler-{config.rank}"
    startup = Startup(name, addresses)
    with startup.failing_with(*SETUP_ERRORS):
        link, group = join(config, runner_config, startup.progress)
        runner = ModelRunner(runner_config, startup.progress, group)
    pulse = Pulse(addresses, name, runner.warm_up_s)
    startup.ready()
    while True:
        pulse.beat()
        if isinstance(message := link.receive(BEAT_S), StepPlan):
            runner.launch(message)
