"""Tensor-parallel ranks as processes of their own, without a launcher: `python -m support.tp_ranks RANK SIZE FOLDER`.

They run the jobs in FOLDER/jobs.json, one after the other; rank 0 writes what they gave into FOLDER/results.json.
"""

import collections
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from support.engine import InlineEngine, runner_config
from support.lives import live, make_engine, told, use_graphs

from ramet.ipc.ranks import Ping
from ramet.ipc.step import UNKNOWN_TOKEN, Row, StepPlan
from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.runner import ModelRunner
from ramet.scheduler.config import TpConfig
from ramet.scheduler.ranks import join, lead

PROMPT = [(7 * i * i + 3) % 300 + 3 for i in range(40)]
POISON = 299
START_S = 120


class Job(msgspec.Struct, frozen=True):
    """What requests are to do (a function of this module) in an engine for the model in `folder`. `graphs`: decodes run
    as CUDA graphs would. `cuda`: on a device that does not exist."""

    folder: str
    life: str = "batch"
    steps_ahead: int = 1
    graphs: bool = False
    cuda: bool = False

    def engine(self, **settings: Any) -> InlineEngine:
        if self.cuda:
            settings |= {"device": "cuda", "cuda_graph_max_bs": 4}
        engine = make_engine(Path(self.folder), steps_ahead=self.steps_ahead, **settings)
        if self.graphs:
            use_graphs(engine)
        if self.life == "eventful":
            poison(engine.runner)
        return engine

    def run(self, engine: InlineEngine) -> Any:
        """In the form that it has after a journey through JSON."""
        lives: dict[str, Callable[[InlineEngine], Any]] = {
            "batch": batch,
            "plain": plain,
            "eventful": eventful,
            "every kind": lambda engine: told(live(engine)),
        }
        return msgspec.json.decode(msgspec.json.encode(lives[self.life](engine)))


class JobResult(msgspec.Struct):
    """`unknown`: how many input tokens rank 0 did not know when it planned. `broadcasts`: of chosen tokens."""

    told: Any
    unknown: int
    broadcasts: int


class Results(msgspec.Struct):
    """`noticed_s`: seconds after which rank 0 noticed that the others had failed."""

    jobs: dict[str, JobResult]
    noticed_s: float


def run_jobs(jobs: dict[str, Job], size: int, workspace: Path) -> Results:
    """What each job gives when it is computed by so many ranks. The path of the workspace must be short."""
    (workspace / "jobs.json").write_bytes(msgspec.json.encode(jobs))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = []
    try:
        for rank in range(size):
            command = [sys.executable, "-m", "support.tp_ranks", str(rank), str(size), str(workspace)]
            with (workspace / f"log-{rank}").open("w") as log:
                processes.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log))
        for rank, process in enumerate(processes):
            code = process.wait(START_S)
            assert code == (1 if rank else 0), (workspace / f"log-{rank}").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return msgspec.json.decode((workspace / "results.json").read_bytes(), type=Results)


def batch(engine: InlineEngine) -> Any:
    """Greedy, seeded, penalised and scored requests, with prompts in chunks and a shared prefix."""
    engine.add("greedy", PROMPT, 12)
    engine.add("scored", PROMPT[:21], 8, logprobs=2, prompt_logprobs=1)
    engine.add("long", PROMPT * 4, 6)
    engine.run(steps=4)
    engine.add("seeded", PROMPT[:5], 12, temperature=0.9, top_p=0.9, seed=5)
    engine.add("penalised", [*PROMPT, 9], 8, repetition_penalty=1.3)
    engine.run()
    outs = engine.outputs["scored"]
    assert outs[0].admitted is not None and outs[0].admitted.prompt_logprobs is not None
    scored = [*outs[0].admitted.prompt_logprobs[1:], *(each for out in outs for each in out.logprobs or [])]
    return {
        "tokens": engine.tokens,
        "ranked": [[logprob.token_id, *logprob.top_ids] for logprob in scored],
        "logprobs": [logprob.logprob for logprob in scored],
    }


def plain(engine: InlineEngine) -> Any:
    """Requests that each rank can choose the tokens of."""
    engine.add("greedy", PROMPT, 20)
    engine.add("seeded", PROMPT[:5], 20, temperature=1.0, seed=5)
    engine.run()
    return engine.tokens


def eventful(engine: InlineEngine) -> Any:
    """One request is aborted, one gives NaN, another comes in their place; the tokens of each, and how it ended."""
    tokens: dict[str, list[int]] = collections.defaultdict(list)
    ends: dict[str, str] = {}
    engine.add("stays", PROMPT, 30, temperature=1.0, seed=5)
    engine.add("leaves", PROMPT[3:], 200, temperature=1.0, seed=6, top_p=0.9)
    engine.add("NaN", [*PROMPT[:9], POISON], 8)
    for turn in range(100):
        if turn == 6:
            engine.core.abort(["leaves"])
            engine.add("comes", PROMPT[7:], 8, frequency_penalty=0.5)
        engine.pipeline.turn()
        for out in engine.core.take_outputs():
            tokens[out.rid] += out.token_ids
            if out.failure or out.finish:
                ends[out.rid] = out.failure.message if out.failure else str(out.finish.reason)
    assert not engine.core.has_work
    del tokens["leaves"]  # where it was on its way depends on how far ahead the steps are
    return {"tokens": tokens, "ends": ends}


def poison(runner: ModelRunner) -> None:
    """Whoever has the token in the prompt gets NaN."""
    embedding = runner._model.embedding
    if POISON in embedding.span:
        with torch.no_grad():
            embedding.weight[POISON - embedding.span.start] = torch.nan


def count_calls() -> collections.Counter[str]:
    """From now on, of unknown tokens and of broadcasts."""
    counts: collections.Counter[str] = collections.Counter()
    launch, broadcast = ModelRunner.launch, TpGroup.broadcast

    def counting_launch(self: ModelRunner, plan: StepPlan, *rest: Any) -> Any:
        counts["unknown"] += plan.token_ids.count(UNKNOWN_TOKEN)
        return launch(self, plan, *rest)

    def counting_broadcast(self: TpGroup, tensor: torch.Tensor) -> None:
        counts["broadcasts"] += 1
        broadcast(self, tensor)

    ModelRunner.launch, TpGroup.broadcast = counting_launch, counting_broadcast
    return counts


@contextlib.contextmanager
def device_of(job: Job) -> Iterator[Callable[[], None]]:
    """The function runs what is left to do on the device of a rank that reads no results."""
    if not job.cuda:
        yield lambda: None
        return
    # Imported when needed: so is triton with it.
    from support import fake_kernels
    from support.fake_cuda import fake_cuda, run_collectives_on

    with fake_cuda() as device, pytest.MonkeyPatch.context() as patch:
        fake_kernels.install(device, patch)
        run_collectives_on(device, patch)
        yield device.synchronize


def main() -> None:
    rank, size, workspace = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    jobs = msgspec.json.decode((workspace / "jobs.json").read_bytes(), type=dict[str, Job])
    config = TpConfig(rank=rank, size=size, address=f"ipc://{workspace}/ranks", setup_timeout_s=60)
    runner = runner_config(Path(next(iter(jobs.values())).folder))
    if rank:
        link, group = join(config, runner, print)
        for job in jobs.values():
            with device_of(job) as synchronize:
                engine = job.engine(group=group)
                while isinstance(message := link.receive(), StepPlan):
                    engine.runner.launch(message)
                    synchronize()
        message = link.receive()
        assert isinstance(message, StepPlan)
        engine.runner.launch(message)  # raises
    ranks = lead(config, runner, print)
    counts = count_calls()
    results = Results({}, 0.0)
    for name, job in jobs.items():
        with device_of(job):
            engine = job.engine(group=ranks.group, followers=ranks)
            counts.clear()
            told = job.run(engine)
        results.jobs[name] = JobResult(told, counts["unknown"], counts["broadcasts"])
        ranks.send(Ping())  # go on to the next
    ranks.send(StepPlan(0, [Row(99, 0, 1, sample=True)], [3]))  # there is no such slot: the others fail
    started = time.monotonic()
    try:
        ranks.group.all_reduce(torch.zeros(1))
    except RuntimeError:
        results.noticed_s = time.monotonic() - started
        (workspace / "results.json").write_bytes(msgspec.json.encode(results))


if __name__ == "__main__":
    main()
