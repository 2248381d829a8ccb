"""A conversation at the terminal: each answer is printed as it comes, and the whole conversation is sent each time.

python examples/chat.py [--base-url http://127.0.0.1:30000/v1] [--system TEXT] [--temperature X]
An empty line, Ctrl-D or Ctrl-C ends it.
"""

import argparse
from collections.abc import Iterator

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam


def main() -> None:
    parser = argparse.ArgumentParser(description="Talk to the model of a server.")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--api-key", default="none", help="needed only if the server was started with --api-key")
    parser.add_argument("--system", help="instructions that stand before the conversation")
    parser.add_argument("--temperature", type=float, help="0 takes the most likely token always")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id
    print(f"Talking to {model}; an empty line ends.")
    messages: list[ChatCompletionMessageParam] = []
    if args.system:
        messages.append({"role": "system", "content": args.system})
    for question in questions():
        messages.append({"role": "user", "content": question})
        options = {} if args.temperature is None else {"temperature": args.temperature}
        stream = client.chat.completions.create(model=model, messages=messages, stream=True, **options)
        answer = ""
        for chunk in stream:
            text = chunk.choices[0].delta.content or ""
            print(text, end="", flush=True)
            answer += text
        print()
        messages.append({"role": "assistant", "content": answer})


def questions() -> Iterator[str]:
    """What the user types, line by line."""
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            return
        yield line


if __name__ == "__main__":
    main()
