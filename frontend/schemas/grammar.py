"""`response_format`, and how it and other fields become the `Grammar` that the text of an answer must match.

Only the form is checked here; the scheduler compiles the grammar and refuses what it cannot honour. The rules that
OpenAI adds for `strict` schemas are not asked for: strict or not, an answer is valid under its schema. `enforceable`
says in other words what those who write schemas (pydantic, zod) say and llguidance does not know.
"""

import re
from typing import Any

import msgspec

from ramet.ipc.errors import invalid
from ramet.ipc.sampling import MAX_SOURCE_CHARS, Grammar, GrammarKind

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# Keywords of JSON Schema that hold schemas: by a name, and one or a list.
_BY_NAME = {"$defs", "definitions", "properties", "patternProperties"}
_NESTED = {"items", "prefixItems", "additionalItems", "additionalProperties", "allOf", "anyOf", "oneOf"}
# An object with one of these may have, or may need, names that its `properties` do not list.
_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"}
# The formats that JSON Schema defines; it says of any other that it asserts nothing.
_FORMATS = {"date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"}
_FORMATS |= {"uri", "uri-reference", "iri", "iri-reference", "uri-template", "uuid", "regex"}
_FORMATS |= {"json-pointer", "relative-json-pointer"}


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


def json_grammar(schema: dict[str, Any] | str, param: str) -> Grammar:
    """For what must be JSON that is valid under `schema`; `param` is to be named in errors. Raises `RequestError`."""
    try:
        if isinstance(schema, str):
            schema = msgspec.json.decode(schema, type=dict[str, Any])
        return Grammar(GrammarKind.JSON_SCHEMA, msgspec.json.encode(enforceable(schema)).decode(), param)
    except RecursionError:
        raise invalid(f"{param}: the schema nests too deep", param) from None
    except msgspec.DecodeError as error:
        raise invalid(f"{param} is not a JSON object: {error}", param) from None


def enforceable(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy that allows nothing which the schema does not. An object whose `properties` are listed gets no others
    unless the schema speaks of them: they would be valid, but models make them up without end."""
    source = msgspec.json.encode(schema)
    if len(source) > MAX_SOURCE_CHARS:
        return schema  # to be refused for that
    copy: dict[str, Any] = msgspec.json.decode(source)
    parts = _schemas_in(copy)
    for part in parts:
        if isinstance(form := part.get("format"), str) and form not in _FORMATS:
            del part["format"]
        if isinstance(names := part.get("propertyNames"), dict):
            _list_names(part, names)
    if any(map(_is_scattered, parts)):
        return copy
    for part in parts:
        listed, required = part.get("properties"), part.get("required", [])
        if isinstance(listed, dict) and listed and isinstance(required, list) and not part.keys() & _OPEN:
            part["additionalProperties"] = not {*map(str, required)} <= listed.keys()
    return copy


def _list_names(schema: dict[str, Any], names: dict[str, Any]) -> None:
    """Do without `propertyNames` where that only says that names are strings, and where it lists those of a map."""
    said = {key: value for key, value in names.items() if key not in ("title", "description")}
    match {"type": "string", **said}:
        case {"type": "string", "enum": [*known], **rest} if not rest and not schema.keys() & _BY_NAME:
            value = schema.get("additionalProperties", True)
            listed = dict.fromkeys([name for name in known if isinstance(name, str)], value)
            schema |= {"properties": listed, "additionalProperties": False}
            del schema["propertyNames"]
        case {"type": "string", **rest} if not rest:
            del schema["propertyNames"]


def _is_scattered(schema: dict[str, Any]) -> bool:
    """Whether one object may be described in several places, none of which lists all of its names."""
    elsewhere = schema.keys() & {"anyOf", "$ref"} and schema.keys() & {"properties", "required"}
    return bool(elsewhere or schema.keys() & {"allOf", "oneOf"})


def _schemas_in(schema: Any) -> list[dict[str, Any]]:
    """Each schema in it, whatever is wrong with some."""
    found, rest = [], [schema]
    while rest:
        part = rest.pop()
        if isinstance(part, list):
            rest += part
        elif isinstance(part, dict):
            found.append(part)
            for keyword, value in part.items():
                if keyword in _NESTED:
                    rest.append(value)
                elif keyword in _BY_NAME and isinstance(value, dict):
                    rest += value.values()
    return found


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
