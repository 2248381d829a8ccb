"""A conversation at the terminal: each answer is printed as it comes, and the whole conversation is sent each time.

python examples/chat.py [--base-url http://127.0.0.1:30000/v1] [--system TEXT]
An empty line, Ctrl-D or Ctrl-C ends it.
"""

import argparse
import contextlib

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam


def main() -> None:
    parser = argparse.ArgumentParser(description="Talk to the model of a server.")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--api-key", default="none", help="needed only if the server was started with --api-key")
    parser.add_argument("--system", help="instructions that stand before the conversation")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token always")
    parser.add_argument("--max-tokens", type=int, default=300, help="longest answer")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id
    print(f"Talking to {model}; an empty line ends.")
    messages: list[ChatCompletionMessageParam] = []
    if args.system:
        messages.append({"role": "system", "content": args.system})
    while question := input("> ").strip():
        messages.append({"role": "user", "content": question})
        stream = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            stream=True,
        )
        answer = ""
        for chunk in stream:
            text = chunk.choices[0].delta.content or ""
            print(text, end="", flush=True)
            answer += text
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    # Leaving in the middle of an answer closes the connection, and the server stops generating.
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        main()
