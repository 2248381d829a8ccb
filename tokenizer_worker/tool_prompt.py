"""Tools in words, for models whose chat template does not know them.

The tools are described in the system message, in the generic form that the frontend reads as `json`: a call is a JSON
object and nothing else. Earlier calls become the text that the model should have written, results a user's message.
"""

import json
from typing import Any

_INSTRUCTION = """You can call functions. These are their descriptions, one a line:
{functions}
To call a function, answer only with a JSON object {{"name": ..., "arguments": {{...}}}} and no other text. \
To call several, answer only with a JSON list of such objects. If no function is of use, answer in plain text."""

Message = dict[str, Any]


def as_plain_messages(messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Message]:
    """The conversation in roles and texts that every template knows."""
    plain: list[Message] = []
    results: Message | None = None  # of the calls just made: templates want users and assistants to take turns
    for message in messages:
        if message["role"] in ("tool", "function"):
            origin = message.get("tool_call_id") or message.get("name") or ""
            text = f"Result of the call {origin}: {message['content']}"
            if results is not None:
                results["content"] += "\n" + text
            else:
                results = {"role": "user", "content": text}
                plain.append(results)
            continue
        results = None
        if calls := message.get("tool_calls"):
            text = "\n".join(filter(None, [message["content"], _written(calls)]))
            plain.append({**{key: message[key] for key in message if key != "tool_calls"}, "content": text})
        else:
            plain.append(message)
    if tools:
        functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        instruction = _INSTRUCTION.format(functions=functions)
        if plain and plain[0]["role"] in ("system", "developer"):
            plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{instruction}"}
        else:
            plain.insert(0, {"role": "system", "content": instruction})
    return plain


def _written(calls: list[dict[str, Any]]) -> str:
    objects = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
    return json.dumps(objects if len(objects) > 1 else objects[0], ensure_ascii=False)
