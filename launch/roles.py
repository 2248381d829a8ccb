"""Which processes make an engine: the one table of names, functions, arguments and placements."""

import msgspec

from ramet.ipc.channel import DETOKENIZER, FRONTEND, SCHEDULER, TOKENIZER, Addresses
from ramet.launch.child import Process
from ramet.launch.config import EngineConfig
from ramet.launch.placement import light


def engine_processes(config: EngineConfig, addresses: Addresses) -> list[Process]:
    """The scheduler first, because it takes longest to start. If rank 0 is on another machine, there are only ranks."""

    def process(name: str, target: str, *arguments: object) -> Process:
        values = [msgspec.to_builtins(value) for value in (*arguments, addresses)]
        if name.startswith("scheduler-"):  # no rank can go on without the others
            return Process(name, target, values, config.placement, group="scheduler")
        return Process(name, target, values, light())

    runner = config.runner
    if runner.device == "cpu":  # each rank sizes its part of the KV pool by the memory that all of them share
        runner = msgspec.structs.replace(runner, memory_fraction=runner.memory_fraction / config.num_ranks)
    tp = msgspec.structs.replace(config.scheduler.tp, address=config.scheduler.tp.address or addresses.ranks)
    followers = []
    for index in range(config.num_ranks):
        if rank := tp.rank + index:
            place = msgspec.structs.replace(tp, rank=rank)
            local = msgspec.structs.replace(runner, device_index=runner.device_index + index)
            followers.append(process(f"scheduler-{rank}", "ramet.scheduler.follower:run", place, local))
    if tp.rank:
        return followers
    scheduler = "embedding_worker" if config.frontend.is_embedding else "worker"
    return [
        process(
            SCHEDULER, f"ramet.scheduler.{scheduler}:run", msgspec.structs.replace(config.scheduler, tp=tp), runner
        ),
        *followers,
        process(FRONTEND, "ramet.frontend.main:run", config.frontend),
        process(DETOKENIZER, "ramet.detokenizer.worker:run", config.detokenizer),
        *(
            process(TOKENIZER.format(index), "ramet.tokenizer_worker.worker:run", index, config.tokenizer)
            for index in range(addresses.tokenizers)
        ),
    ]
