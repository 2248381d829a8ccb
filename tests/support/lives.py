"""Requests of every kind that a step ahead, a CUDA graph or several ranks could treat wrongly, run together in an
`InlineEngine`."""

from pathlib import Path

import msgspec
import torch
from support.engine import InlineEngine

from ramet.ipc.messages import TokenOut
from ramet.ipc.sampling import Grammar, GrammarKind
from ramet.model_runner.cuda_graph import StepGraphs

KINDS = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 5},
    "filtered": {"temperature": 0.8, "seed": 6, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0.9, "seed": 7, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "biased": {"logit_bias": {7: 3.0, 9: -100.0}, "min_tokens": 4},
    "scored": {"logprobs": 2, "prompt_logprobs": 1},
    "constrained": {"grammar": Grammar(GrammarKind.REGEX, "[a-f]{4,30}", "regex")},
}


def run_all(
    folder: Path, copies: int = 2, change: object = lambda engine: None, **settings
) -> dict[str, list[TokenOut]]:
    """What each request was given, by its name; `change` may do something to the engine first."""
    engine = make_engine(folder, **settings)
    change(engine)
    return live(engine, copies)


def make_engine(folder: Path, **settings) -> InlineEngine:
    return InlineEngine(folder, max_running=len(KINDS) + 2, eos_ids=(11, 12), **settings)


def live(engine: InlineEngine, copies: int = 2) -> dict[str, list[TokenOut]]:
    for copy in range(copies):
        for i, (kind, params) in enumerate(KINDS.items()):
            prompt = [(31 * i + 7 * j + 3 * copy) % 300 for j in range(5 + 13 * i)]
            engine.add(f"{kind}{copy}", prompt, 10 + 3 * i, **params)
            engine.run(steps=2)
    engine.run()
    return engine.outputs


def use_graphs(engine: InlineEngine) -> None:
    """Give the runner decode graphs whose capture keeps the function itself."""
    runner = engine.runner
    parts = (runner._model, runner._slots, runner._pool, runner._backend, runner._choose)
    config = msgspec.structs.replace(runner._config, cuda_graph_max_bs=8)
    with torch.inference_mode():
        runner._graphs = StepGraphs(config, *parts, lambda run: run, lambda text: None)


def told(outputs: dict[str, list[TokenOut]]) -> dict[str, tuple]:
    """The tokens, ends and log-probabilities of requests, to be compared exactly."""
    return {
        rid: (
            [token for out in outs for token in out.token_ids],
            outs[-1].finish,
            [logprob for out in outs for logprob in out.logprobs or []],
            outs[0].admitted and outs[0].admitted.prompt_logprobs,
        )
        for rid, outs in outputs.items()
    }
