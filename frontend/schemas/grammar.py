"""`response_format`, and how it and other fields become the `Grammar` that the text of an answer must match.

Only the form is checked here; the scheduler compiles the grammar and refuses what it cannot honour. The rules that
OpenAI adds for `strict` schemas are not asked for: every schema is followed as it stands, strict or not.
"""

import re
from typing import Any

import msgspec

from ramet.ipc.errors import invalid
from ramet.ipc.sampling import Grammar, GrammarKind

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class TextFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """No constraint."""


class JsonObjectFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """`description` is for the model's eyes, and no prompt here shows it; without a `schema`, any JSON is meant."""

    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


class StructuralTagFormat(msgspec.Struct, tag_field="type", tag="structural_tag"):
    """Known, to be refused by its name."""


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat


def only_one(asked: list[Grammar | None]) -> Grammar | None:
    """The grammar among these, if there is one. Raises `RequestError` if there are more."""
    grammars = [grammar for grammar in asked if grammar is not None]
    if len(grammars) > 1:
        raise invalid(f"{' and '.join(g.param for g in grammars)} exclude each other", grammars[-1].param)
    return grammars[0] if grammars else None


def json_grammar(schema: dict[str, Any], param: str) -> Grammar:
    """For what must be JSON that is valid under `schema`; `param` is to be named in errors."""
    return Grammar(GrammarKind.JSON_SCHEMA, msgspec.json.encode(schema).decode(), param)


def requested_format(asked: ResponseFormat | None) -> Grammar | None:
    """Raises `RequestError` for a name that is not one, and for what is not built."""
    match asked:
        case JsonObjectFormat():
            return json_grammar({"type": "object"}, "response_format")
        case JsonSchemaFormat(wanted):
            if not _NAME.fullmatch(wanted.name):
                param = "response_format.json_schema.name"
                raise invalid(f"{param} must be 1 to 64 of a-z, A-Z, 0-9, _ and -, got {wanted.name!r}", param)
            return json_grammar(wanted.schema or {}, "response_format")
        case StructuralTagFormat():
            words = "response_format: structural_tag is not supported by this server"
            raise invalid(words, "response_format", "unsupported_parameter")
    return None
