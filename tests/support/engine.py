"""The scheduler core and a real model runner in one process: what the scheduler process runs, without its sockets."""

from pathlib import Path

import torch

from ramet.ipc.messages import Generate, TokenOut
from ramet.ipc.sampling import SamplingParams
from ramet.model_runner.config import LoadFormat, RunnerConfig
from ramet.model_runner.parallel import TpGroup
from ramet.model_runner.runner import ModelRunner
from ramet.scheduler.config import SchedulerConfig
from ramet.scheduler.core import SchedulerCore
from ramet.scheduler.grammar import Matcher, load_tokenizer
from ramet.scheduler.grammar_pool import GrammarPool
from ramet.scheduler.pipeline import Pipeline
from ramet.scheduler.ranks import Ranks

CONTEXT = 256


class InlineEngine:
    """Add requests, `run` them to their end, read `tokens` and `outputs` by request id. `followers` get each plan
    before it is executed."""

    def __init__(
        self,
        folder: Path,
        *,
        total_tokens: int = 1024,
        max_running: int = 8,
        dtype: str = "float32",
        group: TpGroup | None = None,
        followers: Ranks | None = None,
        device: str = "cpu",
        cuda_graph_max_bs: int = 0,
        quantization: str | None = None,
        attention_backend: str = "auto",
        **scheduler,
    ) -> None:
        defaults = {
            "page_size": 16,
            "max_running": max_running,
            "max_step_tokens": 64,
            "max_prefill_tokens": 32,
            "context_length": CONTEXT,
            "eos_ids": (),
        }
        config = SchedulerConfig(**{**defaults, "tokenizer_dir": str(folder), **scheduler})
        self.runner = ModelRunner(
            runner_config(
                folder,
                dtype=dtype,
                device=device,
                page_size=config.page_size,
                max_running=max_running,
                max_step_tokens=config.max_step_tokens,
                context_length=config.context_length,
                max_total_tokens=total_tokens,
                cuda_graph_max_bs=cuda_graph_max_bs,
                quantization=quantization,
                attention_backend=attention_backend,
            ),
            lambda text: None,
            group,
        )
        self.config = config
        self.core = SchedulerCore(config, self.runner.num_pages)
        self.grammars = GrammarPool(config, self.runner.vocab_size, lambda: None)
        tell_ranks = followers.send if followers is not None else None
        self.pipeline = Pipeline(self.core, self.runner, config.steps_ahead, self.grammars.fill, tell_ranks)
        self.tokens: dict[str, list[int]] = {}
        self.outputs: dict[str, list[TokenOut]] = {}

    def add(self, rid: str, prompt: list[int], max_tokens: int, **params) -> None:
        sampling = SamplingParams(**{"temperature": 0.0, "seed": 0, **params, "max_tokens": max_tokens})
        matcher = None
        if sampling.grammar is not None:
            tokenizer = load_tokenizer(self.config.tokenizer_dir, self.runner.vocab_size, list(self.config.eos_ids))
            matcher = Matcher(tokenizer, sampling.grammar)
        self.core.add(Generate(rid, prompt, sampling), matcher)

    def run(self, steps: int | None = None) -> None:
        """So many turns, or until nothing is left to do."""
        while self.core.has_work and (steps is None or steps > 0):
            self.pipeline.turn()
            for out in self.core.take_outputs():
                assert out.failure is None, out.failure
                self.tokens.setdefault(out.rid, []).extend(out.token_ids)
                self.outputs.setdefault(out.rid, []).append(out)
            steps = None if steps is None else steps - 1


def runner_config(folder: Path, **settings) -> RunnerConfig:
    defaults = {
        "model_dir": str(folder),
        "weights": str(folder),
        "load_format": LoadFormat.SAFETENSORS,
        "dtype": "float32",
        "device": "cpu",
        "page_size": 16,
        "max_running": 8,
        "max_step_tokens": 64,
        "context_length": CONTEXT,
        "memory_fraction": 0.1,
        "max_total_tokens": 1024,
    }
    return RunnerConfig(**{**defaults, **settings})


def reference_greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """What transformers generates, without any cache: one whole forward pass per token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]
