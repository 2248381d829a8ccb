"""An answer as a Python object: a pydantic model is sent as a JSON schema, and the answer always fits it.

python examples/structured_output.py [--base-url http://127.0.0.1:30000/v1] [TEXT]
"""

import argparse
from typing import Annotated

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field


class Event(BaseModel):
    """Bounds keep a small model from writing one field for ever."""

    title: str = Field(max_length=40)
    guests: list[Annotated[str, Field(max_length=20)]] = Field(max_length=3)
    year: int = Field(ge=1900, le=2100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Read an event out of a text.")
    parser.add_argument("text", nargs="?", default="Alice and Bob met for a science fair in 2024.")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--api-key", default="none", help="needed only if the server was started with --api-key")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id
    question = f"Describe this event as JSON with title, guests and year: {args.text}"
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
    completion = client.chat.completions.parse(model=model, messages=messages, response_format=Event, temperature=0)
    event = completion.choices[0].message.parsed
    assert event is not None
    print(f"{event.title} ({event.year}), with {', '.join(event.guests) or 'nobody'}")

    # Without a schema: a regular expression, or a grammar as `ebnf`, as extras of this server.
    verdict = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"Is this about science? {args.text}"}],
        extra_body={"regex": "yes|no"},
        temperature=0,
    )
    print(f"about science: {verdict.choices[0].message.content}")


if __name__ == "__main__":
    main()
