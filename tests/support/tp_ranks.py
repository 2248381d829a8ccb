"""Tensor-parallel ranks as processes of their own, without a launcher: `python -m support.tp_ranks RANK SIZE FOLDER`.

They run each model folder named in FOLDER/models.json; rank 0 writes what its requests gave into FOLDER/results.json.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from support.engine import InlineEngine, runner_config

from ramet.ipc.ranks import Execute, Ping
from ramet.ipc.step import Row, StepPlan
from ramet.model_runner.runner import ModelRunner
from ramet.scheduler.config import TpConfig
from ramet.scheduler.ranks import join, lead

PROMPT = [(7 * i * i + 3) % 300 + 3 for i in range(40)]
START_S = 120


def run_models(folders: list[Path], size: int, workspace: Path) -> list[Any]:
    """What `requests_of` gives for each model, computed by so many ranks; then the seconds after which rank 0 noticed
    that the others had failed."""
    workspace.mkdir()
    (workspace / "models.json").write_text(json.dumps([str(folder) for folder in folders]))
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
    return json.loads((workspace / "results.json").read_text())


def requests_of(engine: InlineEngine) -> Any:
    """A batch of greedy, seeded, penalised and scored requests, with prompts in chunks and a shared prefix."""
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


def main() -> None:
    rank, size, workspace = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    folders = [Path(name) for name in json.loads((workspace / "models.json").read_text())]
    config = TpConfig(rank=rank, size=size, address=f"ipc://{workspace}/ranks", setup_timeout_s=60)
    if rank:
        link, group = join(config, runner_config(folders[0]), print)
        for folder in folders:
            runner = ModelRunner(runner_config(folder), lambda text: None, group)
            while isinstance(message := link.receive(), Execute):
                runner.execute(message.plan)
        message = link.receive()
        assert isinstance(message, Execute)
        runner.execute(message.plan)  # raises
    ranks = lead(config, runner_config(folders[0]), print)
    results = []
    for folder in folders:
        results.append(requests_of(InlineEngine(folder, group=ranks.group, followers=ranks)))
        assert ranks._server is not None
        ranks._server.send(ranks._peers, Ping())  # go on to the next
    ranks.send(StepPlan(0, [Row(99, 0, 1, sample=True)], [3]))  # there is no such slot: the others fail
    started = time.monotonic()
    try:
        ranks.group.all_reduce(torch.zeros(1))
    except RuntimeError:
        results.append(time.monotonic() - started)
    (workspace / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
