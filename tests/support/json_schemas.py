"""Varied JSON schemas from a seeded program: what structured output is tried with, and the trial.

Strings, arrays and numbers are bounded for the most part, so that even a model of random weights ends its answer.
"""

import collections
import json
import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
from support.server import RunningServer

Schema = dict[str, Any]

# Of the schemas that are tried with each model.
SMOLLM2_SEEDS, TINY_SEEDS = range(40), range(40, 300)
QUESTION = [{"role": "user", "content": "Describe a person as JSON, with a name and an age."}]

FORMATS = ("date", "time", "date-time", "duration", "ipv4", "ipv6", "uuid", "email", "hostname", "uri")
PATTERNS = (
    "^[a-z]{2,6}$",
    "^[A-Z]{2}-[0-9]{3}$",
    "^(red|green|blue)$",
    "^\\+?[0-9]{3,8}$",
    "^\\w{1,5}( \\w{1,5})?$",
    "^x",
)
NAMES = ("id", "name", "count", "tags", "note", "a b", "größe", "x-y", 'quo"te', "kind")


def random_schema(seed: int) -> Schema:
    """An object at the top, as the API's users write it, but now and then something else."""
    made = _Maker(random.Random(seed))
    schema = made.object(3) if seed % 8 else made.any(3)
    if made.definitions:
        schema = {**schema, "$defs": made.definitions}
    return schema


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.definitions: dict[str, Schema] = {}

    def any(self, depth: int) -> Schema:
        leaves = [self.string, self.string, self.integer, self.number, self.constant]
        inner = [self.object, self.array, self.any_of, self.one_of, self.reference, self.tuple, self.map]
        make: Callable[[int], Schema] = self._rng.choice(leaves + (inner if depth > 0 else []))
        return make(depth - 1)

    def object(self, depth: int) -> Schema:
        rng = self._rng
        names = rng.sample(NAMES, rng.randint(1, 3))
        schema: Schema = {
            "type": "object",
            "properties": {name: self.any(depth - 1) for name in names},
            "required": [name for name in names if rng.random() < 0.7],
            "additionalProperties": False,
        }
        if rng.random() < 0.2:
            schema["title"], schema["description"] = "A thing", "What it is."
        return schema

    def map(self, depth: int) -> Schema:
        """Names that are not known beforehand."""
        if self._rng.random() < 0.3:
            return {"type": "object", "additionalProperties": self.integer(0)}
        return {
            "type": "object",
            "patternProperties": {"^[a-z]{1,3}$": self.any(depth - 1), "^[A-Z][0-9]$": self.constant(0)},
            "additionalProperties": False,
            "maxProperties": 3,
        }

    def array(self, depth: int) -> Schema:
        low = self._rng.randint(0, 2)
        return {
            "type": "array",
            "items": self.any(depth - 1),
            "minItems": low,
            "maxItems": low + self._rng.randint(0, 2),
        }

    def tuple(self, depth: int) -> Schema:
        items = [self.any(depth - 1) for _ in range(self._rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items) - 1}

    def any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth - 1) for _ in range(2)] + [{"type": "null"}] * self._rng.randint(0, 1)}

    def one_of(self, depth: int) -> Schema:
        """Branches that a tag tells apart, or types."""
        if self._rng.random() < 0.4:
            return {"oneOf": [self.integer(0), {"type": "boolean"}, self.array(depth - 1)]}
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"type": "string", "const": tag}, "value": self.any(depth - 1)},
                    "required": ["kind", "value"],
                    "additionalProperties": False,
                }
                for tag in self._rng.sample(["circle", "square", "line"], 2)
            ]
        }

    def reference(self, depth: int) -> Schema:
        name = f"d{self._rng.randint(0, 2)}"
        if name not in self.definitions:
            self.definitions[name] = {}  # another reference to it may come up meanwhile, and means anything
            self.definitions[name] = self._rng.choice([self._linked, self.object, self.string])(depth)
        if self.definitions[name] == {}:
            return self.integer(0)
        return {"$ref": f"#/$defs/{name}"}

    def _linked(self, _depth: int) -> Schema:
        """A schema that refers to itself."""
        own = {"$ref": f"#/$defs/{list(self.definitions)[-1]}"}
        properties = {"value": self.constant(0), "next": {"anyOf": [{"type": "null"}, own]}}
        return {
            "type": "object",
            "properties": properties,
            "required": ["value", "next"],
            "additionalProperties": False,
        }

    def string(self, _depth: int) -> Schema:
        rng = self._rng
        schema: Schema = {"type": "string"}
        match rng.randint(0, 3):
            case 0:
                low = rng.randint(0, 3)
                schema |= {"minLength": low, "maxLength": low + rng.randint(0, 6)}
            case 1:
                schema |= {"pattern": rng.choice(PATTERNS), "maxLength": 12}
            case 2:
                schema |= {"format": rng.choice(FORMATS), "maxLength": 40}
            case _:
                schema |= {"enum": rng.sample(["red", "grün", "", "a\nb", 'say "hi"', "\\", "x" * 30], 3)}
        return schema

    def integer(self, _depth: int) -> Schema:
        rng = self._rng
        low = rng.randint(-1000, 1000)
        schema: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}
        if rng.random() < 0.2:
            schema = {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 99, "multipleOf": rng.randint(1, 9)}
        return schema

    def number(self, _depth: int) -> Schema:
        low = round(self._rng.uniform(-50, 50), 2)
        return {"type": "number", "minimum": low, "maximum": low + self._rng.randint(1, 9)}

    def constant(self, _depth: int) -> Schema:
        rng = self._rng
        if rng.random() < 0.3:
            return {"type": rng.choice(["boolean", "null"])}
        value = rng.choice(["fixed", 7, None, True, [1, "two"], {"deep": {"er": []}}])
        return {"const": value} if rng.random() < 0.5 else {"enum": [value, "other", 1.5]}


formats = jsonschema.FormatChecker()


@formats.checks("date")
@formats.checks("time")
@formats.checks("date-time")
def _is_time(value: object) -> bool:
    """Allowing what is documented as allowed: 29 February in any year, and second 60 in any minute."""
    if not isinstance(value, str):
        return True
    tame = re.sub(r"-02-29", "-02-28", re.sub(r"(:\d\d):60", r"\1:59", value))
    tame = tame if "-" in tame[:5] else f"2000-01-01T{tame}"
    kind = "date-time" if ":" in tame else "date"
    return jsonschema.Draft202012Validator.FORMAT_CHECKER.conforms(tame, kind)


def try_schemas(server: RunningServer, seeds: range, max_tokens: int) -> collections.Counter[str]:
    """How the answers ended. What is complete is valid."""

    def ask(seed: int) -> str:
        schema = random_schema(seed)
        body = {
            "model": server.model,
            "messages": QUESTION,
            "temperature": 1,
            "seed": seed,
            "max_tokens": max_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": schema, "strict": True},
            },
        }
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
        if response.status_code == 400:
            assert response.json()["error"]["param"] == "response_format", response.text
            return "refused"
        assert response.status_code == 200, response.text
        [choice] = response.json()["choices"]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(
                json.loads(choice["message"]["content"]),
                schema,
                jsonschema.Draft202012Validator,
                format_checker=formats,
            )
        return choice["finish_reason"]

    with ThreadPoolExecutor(48) as threads:
        return collections.Counter(threads.map(ask, seeds))
