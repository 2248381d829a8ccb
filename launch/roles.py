"""Which processes make an engine: the one table of names, functions, arguments and placements."""

import os

import msgspec

from ramet.ipc.channel import Addresses
from ramet.launch.child import Process
from ramet.launch.config import EngineConfig
from ramet.launch.placement import computing, light
from ramet.launch.supervisor import FRONTEND, SCHEDULER


def engine_processes(config: EngineConfig, addresses: Addresses) -> list[Process]:
    """The scheduler first, because it takes longest to start."""

    def process(name: str, target: str, *arguments: object) -> Process:
        placement = computing(config.cpus, config.num_threads, os.environ) if name == SCHEDULER else light()
        return Process(name, target, [msgspec.to_builtins(value) for value in (*arguments, addresses)], placement)

    scheduler = "embedding_worker" if config.frontend.is_embedding else "worker"
    return [
        process(SCHEDULER, f"ramet.scheduler.{scheduler}:run", config.scheduler, config.runner),
        process(FRONTEND, "ramet.frontend.main:run", config.frontend),
        process("detokenizer", "ramet.detokenizer.worker:run", config.detokenizer),
        *(
            process(f"tokenizer-{index}", "ramet.tokenizer_worker.worker:run", index, config.tokenizer)
            for index in range(config.num_tokenizers)
        ),
    ]
