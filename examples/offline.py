"""The engine without a server: prompts from a file or the command line are continued, all at once.

python examples/offline.py [--model-path MODEL] [PROMPT ...]
With `--file` each line of a file is a prompt; there may be thousands.
"""

import argparse
import time
from pathlib import Path

from ramet import Engine, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "To be, or not to be,"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue many prompts.")
    parser.add_argument("prompts", nargs="*", default=PROMPTS, metavar="PROMPT")
    parser.add_argument("--file", type=Path, help="a prompt in each line")
    parser.add_argument("--model-path", help="as for the server (SmolLM2-135M-Instruct)")
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token always")
    args = parser.parse_args()

    prompts = args.file.read_text(encoding="utf-8").splitlines() if args.file else args.prompts
    with Engine(model_path=args.model_path) as engine:
        began = time.perf_counter()
        outputs = engine.generate(prompts, SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens))
        took_s = time.perf_counter() - began
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"{prompt}|{output.text} ({output.finish_reason})")
    print(f"{sum(output.completion_tokens for output in outputs)} tokens in {took_s:.2f} s")


# No guard around `main` is needed for the engine: its processes do not import this file.
if __name__ == "__main__":
    main()
