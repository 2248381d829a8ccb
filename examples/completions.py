"""Plain completions: several prompts in one request, n continuations of each, and their log-probabilities.

python examples/completions.py [--base-url http://127.0.0.1:30000/v1] [-n 2] [PROMPT ...]
With a seed, the same request gives the same continuations again.
"""

import argparse

from openai import OpenAI

PROMPTS = ["The capital of France is", "Water boils at"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue some prompts.")
    parser.add_argument("prompts", nargs="*", default=PROMPTS, metavar="PROMPT")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--api-key", default="none", help="needed only if the server was started with --api-key")
    parser.add_argument("-n", type=int, default=2, help="continuations of each prompt")
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    completion = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=args.prompts,
        n=args.n,
        max_tokens=args.max_tokens,
        temperature=0.8,
        seed=args.seed,
        logprobs=3,
    )
    for choice in completion.choices:
        # Choices come prompt by prompt, the n continuations of one beside each other.
        prompt = args.prompts[choice.index // args.n]
        print(f"[{choice.index}] {prompt}{choice.text!r} ({choice.finish_reason})")
        logprobs = choice.logprobs
        assert logprobs and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
        for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
            others = ", ".join(f"{other!r} {other_value:.2f}" for other, other_value in (top or {}).items())
            print(f"      {token!r:<16} {value or 0.0:6.2f}   most likely: {others}")
    assert completion.usage is not None
    print(f"{completion.usage.prompt_tokens} prompt tokens, {completion.usage.completion_tokens} generated")


if __name__ == "__main__":
    main()
