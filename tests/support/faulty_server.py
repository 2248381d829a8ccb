"""A server whose model runner fails where a prompt says so, and dawdles: `python -m support.faulty_server FLAGS`.

All else is real. A prompt with one of the tokens below breaks the step that computes it, or that request's logits. See
`RunningServer.dawdling` for the other.
"""

import contextlib
import itertools
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import torch
from support.server import DAWDLE

from ramet.ipc.channel import SCHEDULER, Addresses
from ramet.ipc.step import StepPlan
from ramet.launch import cli, serve
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.runner import ModelRunner, PendingStep
from ramet.scheduler import worker
from ramet.scheduler.config import SchedulerConfig

OUT_OF_MEMORY, KERNEL_ERROR, NOT_A_NUMBER = 301, 302, 303


class FaultyRunner(ModelRunner):
    def __init__(self, *args, **kwargs) -> None:
        self._poisoned: set[int] = set()  # slots
        self._prompt_lens: dict[int, int] = {}  # by slot
        super().__init__(*args, **kwargs)

    def launch(self, plan: StepPlan, masks=None) -> PendingStep:
        with contextlib.suppress(FileNotFoundError):
            time.sleep(float(Path(tempfile.gettempdir(), DAWDLE).read_text()))
        self._prompt_lens |= {a.slot: a.prompt_len for a in plan.admissions}
        tokens = iter(plan.token_ids)
        chunks = {row.slot: list(itertools.islice(tokens, row.length)) for row in plan.rows}
        starts = {row.slot: row.start for row in plan.rows}
        # Not those that were generated.
        prompts = {slot: chunk for slot, chunk in chunks.items() if starts[slot] < self._prompt_lens[slot]}
        given = set().union(*prompts.values())
        self._poisoned -= set(plan.released)
        self._poisoned |= {slot for slot, chunk in prompts.items() if NOT_A_NUMBER in chunk}
        broken = [i for i, row in enumerate(r for r in plan.rows if r.sample) if row.slot in self._poisoned]
        logits = self._model.logits

        def poisoned(hidden: torch.Tensor) -> torch.Tensor:
            made = logits(hidden)
            # In the middle of the step, after the slots and the KV pool have taken in what they were given.
            if OUT_OF_MEMORY in given:
                raise torch.OutOfMemoryError("out of memory: tried to allocate 80 GiB")
            if KERNEL_ERROR in given:
                raise RuntimeError("a kernel failed")
            made[broken] = float("nan")
            return made

        self._model.logits = poisoned
        try:
            return super().launch(plan, masks)
        finally:
            self._model.logits = logits


def run(config: SchedulerConfig, runner_config: RunnerConfig, addresses: Addresses) -> None:
    worker.ModelRunner = FaultyRunner
    worker.run(config, runner_config, addresses)


def main() -> None:
    real = serve.engine_processes

    def with_faults(config, addresses):
        return [
            msgspec.structs.replace(process, target="support.faulty_server:run")
            if process.name == SCHEDULER
            else process
            for process in real(config, addresses)
        ]

    serve.engine_processes = with_faults
    sys.exit(cli.launch_server())


if __name__ == "__main__":
    main()
