"""The grammar of an answer that is a call, in the form that the model's own calls have.

Written in llguidance's variant of Lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md). Each tool
has a rule of its own, and its schema is a document of its own, so that references inside it hold. What stands behind
`//` in its line names it in errors (`scheduler/grammar.py`).
"""

import json

from ramet.frontend.config import FrontendConfig
from ramet.frontend.schemas.grammar import enforceable
from ramet.frontend.schemas.tools import ToolUse
from ramet.ipc.errors import invalid
from ramet.ipc.sampling import JSON_SPELLING, Grammar, GrammarKind


def tool_grammar(use: ToolUse, config: FrontendConfig) -> Grammar:
    """One call, or several where they may be parallel. Raises `RequestError` for a schema that cannot be written."""
    form = config.tool_call_parser

    def mark(name: str) -> str:
        """As the one token that models were trained on, where the vocabulary has it."""
        token_id = config.marker_ids.get(name)
        return json.dumps(name) if token_id is None else f"<[{token_id}]>"

    # Newer Mistral models write name and arguments side by side, all others an object with both.
    named = form == "mistral" and "[ARGS]" in config.marker_ids
    key = "parameters" if form == "llama3" else "arguments"
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(use.callable)))}"]
    for i, (name, schema) in enumerate(use.callable.items()):
        if named:
            rules.append(f"call_{i}: {mark('[TOOL_CALLS]')} {json.dumps(name)} {mark('[ARGS]')} arguments_{i}")
        else:
            head = f'{{"name": {json.dumps(name)}, "{key}": '
            rules.append(f'call_{i}: {json.dumps(head)} arguments_{i} "}}"')
        try:
            written = json.dumps({**enforceable(schema), "x-guidance": JSON_SPELLING})
            rules.append(f"arguments_{i}: %json {written} // the parameters of {name!r}")
        except (ValueError, RecursionError) as error:
            raise invalid(f"tools: the parameters of {name!r} cannot be written as JSON: {error}", "tools") from error
    match form:
        case "hermes":
            rules.append(f'tagged: {mark("<tool_call>")} "\\n" call "\\n" {mark("</tool_call>")}')
            one, several = "tagged", 'tagged ("\\n" tagged)*'
        case "llama3":
            one, several = "call", 'call ("; " call)*'
        case "mistral" if named:
            one, several = "call", "call+"
        case "mistral":
            head = f'{mark("[TOOL_CALLS]")} "["'
            one, several = f'{head} call "]"', f'{head} call (", " call)* "]"'
        case _:
            one, several = "call", 'call | "[" call (", " call)* "]"'
    rules.insert(0, f"start: {several if use.parallel else one}")
    params = ("function_call", "functions") if use.legacy else ("tool_choice", "tools")
    return Grammar(GrammarKind.LARK, "\n".join(rules), params[not use.required])
