"""`ramet bench offline`: a workload through scheduler and model in this process, without HTTP, text or other processes.

What it measures is the ceiling of a server with the same flags. Loads torch: import it once the placement is settled.
"""

import time
from typing import Any

import msgspec
import tqdm

from ramet.ipc.messages import Generate
from ramet.ipc.sampling import SamplingParams
from ramet.launch.bench.workload import Scale, Workload, draw_items
from ramet.launch.config import EngineConfig
from ramet.model_runner.runner import ModelRunner
from ramet.scheduler.core import SchedulerCore
from ramet.scheduler.pipeline import Pipeline


def run_offline(config: EngineConfig, load: Workload) -> dict[str, Any]:
    """All requests wait from the start. Raises ValueError for one that this engine would refuse."""
    runner = ModelRunner(config.runner, lambda text: None)
    core = SchedulerCore(config.scheduler, runner.num_pages)
    pipeline = Pipeline(core, runner, config.scheduler.steps_ahead)
    items = draw_items(load, range(runner.vocab_size), Scale(), "measured", load.num_requests)
    for index, item in enumerate(items):
        params = SamplingParams(
            max_tokens=item.output_len, temperature=load.temperature, seed=load.seed + index, ignore_eos=load.ignore_eos
        )
        core.add(Generate(str(index), item.units, params))
    started_s = time.perf_counter()
    with tqdm.tqdm(total=len(items), unit="request", disable=None) as bar:
        while True:
            for out in core.take_outputs():
                if out.failure is not None:
                    raise ValueError(f"request {out.rid} failed: {out.failure.message}")
                bar.update(out.finish is not None)
            if not core.has_work:
                break
            pipeline.turn()
    wall_s, totals = time.perf_counter() - started_s, msgspec.structs.asdict(core.counters)
    rates = {f"{name}_per_s": totals[name] / wall_s for name in ("finished", "prompt_tokens", "generated_tokens")}
    return {"wall_s": wall_s, **totals, **rates}
