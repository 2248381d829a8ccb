"""A model that calls functions: it asks for them, this program runs them, and the model answers with what they gave.

python examples/tools.py [--base-url http://127.0.0.1:30000/v1] [--tool-choice required] [QUESTION]
"""

import argparse
import datetime
import json
from collections.abc import Callable
from typing import Any

from openai import OpenAI


def get_weather(city: str) -> str:
    return f"In {city} the sun shines, and it has {len(city) + 10} degrees."


def get_time() -> str:
    return datetime.datetime.now().strftime("It is %H:%M.")


FUNCTIONS: dict[str, Callable[..., str]] = {"get_weather": get_weather, "get_time": get_time}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 40}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "get_time", "description": "The time of day."}},
]


def run(name: str, arguments: str) -> str:
    """What the model writes may be wrong, and it may do better if it is told so. Required calls always fit."""
    try:
        return FUNCTIONS[name](**json.loads(arguments))
    except (ValueError, TypeError) as error:
        return f"error: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Let the model call functions.")
    parser.add_argument("question", nargs="?", default="What is the weather in Paris?")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--api-key", default="none", help="needed only if the server was started with --api-key")
    parser.add_argument("--tool-choice", choices=["auto", "required"], default="auto", help="whether it must call one")
    parser.add_argument("--max-tokens", type=int, default=300, help="longest answer")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    asked: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": args.question}],
        "tools": TOOLS,
        "temperature": 0,
        "max_tokens": args.max_tokens,
    }
    message = client.chat.completions.create(**asked, tool_choice=args.tool_choice).choices[0].message
    if message.tool_calls:
        asked["messages"].append(message)
        for call in message.tool_calls:
            assert call.type == "function"
            result = run(call.function.name, call.function.arguments)
            print(f"{call.function.name}({call.function.arguments}): {result}")
            asked["messages"].append({"role": "tool", "tool_call_id": call.id, "content": result})
        message = client.chat.completions.create(**asked, tool_choice="none").choices[0].message
    print(message.content)


if __name__ == "__main__":
    main()
