"""What rounding weights costs: perplexity of a model on this project's own prose, for each `--quantization`.

Each window of the text is scored as a prompt. Beside the perplexity, the mean distance of a token's log-probability
from the one in float32.

    python benchmarks/quantization_error.py [--model-path …] [--window 512] [--windows 8]
"""

import argparse
import math
import statistics
from pathlib import Path

import msgspec

from ramet.ipc.sampling import SamplingParams
from ramet.ipc.step import Admission, PageGrant, Row, StepPlan
from ramet.launch.config import resolve
from ramet.launch.model_source import resolve_model
from ramet.launch.server_args import ServerArgs
from ramet.model_runner.runner import ModelRunner
from ramet.tokenizer_worker.tokenizer import Tokenizer

TEXT = Path(__file__).parent.parent / "docs" / "architecture.md"
MODES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path")
    parser.add_argument("--window", type=int, default=512, help="tokens scored together")
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    found = {}
    for mode, settings in MODES.items():
        found[mode] = score(args, settings)
        loss = -statistics.fmean(found[mode])
        distance = statistics.fmean(abs(a - b) for a, b in zip(found[mode], found["float32"], strict=True))
        print(
            f"{mode:9} perplexity {math.exp(loss):8.3f}  mean |difference of log-probability| {distance:.4f}",
            flush=True,
        )


def score(args: argparse.Namespace, settings: dict[str, str]) -> list[float]:
    """The log-probability of each token but the first of each window."""
    model = resolve_model(ServerArgs(model_path=args.model_path))
    server_args = ServerArgs(**{"dtype": "bfloat16", "device": "cpu", "max_total_tokens": 4 * args.window, **settings})
    config = msgspec.structs.replace(resolve(server_args, model).runner, max_step_tokens=args.window)
    runner = ModelRunner(config, lambda _text: None)
    ids = Tokenizer(model.tokenizer_dir).encode(TEXT.read_text("utf-8"), add_special_tokens=False)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, seed=0)
    pages = PageGrant(0, 0, list(range(-(-args.window // config.page_size))))
    values: list[float] = []
    for first in range(0, min(len(ids), args.windows * args.window) - args.window + 1, args.window):
        prompt = ids[first : first + args.window]
        row = Row(0, 0, len(prompt), sample=False, prompt_logprobs=True)
        released = [0] if first else []
        plan = StepPlan(1, [row], prompt, [Admission(0, prompt, len(prompt), params, [])], [pages], released)
        values += [scored.logprob for scored in runner.execute(plan).rows[0].prompt_logprobs or []]
    return values


if __name__ == "__main__":
    main()
