"""One streamed chat completion, with the usage of tokens at its end and the time to the first one.

python examples/streaming.py [--base-url http://127.0.0.1:30000/v1] [PROMPT]
Run it twice with one long prompt: the second time most of its tokens come from the prefix cache.
"""

import argparse
import time

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="Stream one answer.")
    parser.add_argument("prompt", nargs="?", default="What is the capital of France?")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--api-key", default="none", help="needed only if the server was started with --api-key")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token always")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": args.prompt}],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        stream=True,
        stream_options={"include_usage": True},
    )
    first_s = finish_reason = usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:  # the last chunk, which holds the usage, has none
            if choice.delta.content:
                first_s = first_s or time.perf_counter() - started
                print(choice.delta.content, end="", flush=True)
            finish_reason = choice.finish_reason or finish_reason
    total_s = time.perf_counter() - started
    assert usage is not None and usage.prompt_tokens_details is not None
    print(f"\n\nended by {finish_reason} after {total_s:.2f} s", end="")
    print(f"; first text after {first_s:.2f} s" if first_s is not None else "; no text")
    print(f"{usage.prompt_tokens} prompt tokens, of which cached {usage.prompt_tokens_details.cached_tokens};", end=" ")
    print(f"{usage.completion_tokens} generated")


if __name__ == "__main__":
    main()
