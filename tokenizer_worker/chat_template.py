"""`ChatTemplate`: from a conversation to the text that the model was trained on.

A model's template is a Jinja program from the internet: it runs in Jinja's immutable sandbox, with the variables and
helpers that Hugging Face templates expect (https://huggingface.co/docs/transformers/chat_templating_writing). It comes
from the model or the operator, never from a request; what a request puts into it gets `MAX_RENDER_S` of CPU time.
"""

import contextlib
import datetime
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ramet.ipc.errors import invalid
from ramet.ipc.messages import Chat
from ramet.tokenizer_worker.tool_prompt import as_plain_messages

# Of one conversation, where a thousand times less is usual: some templates go over all messages for each message.
MAX_RENDER_S = 2.0


class ChatTemplate:
    """`variables`: what the template reads. Raises jinja2.TemplateSyntaxError if the source is not a template."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self.source = source
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        self._special_tokens = special_tokens

    def render(self, chat: Chat) -> str:
        """The prompt. Raises `RequestError` with the template's own words if it refuses the conversation.

        For a template that does not know tools, they and their calls are put into words (`tool_prompt.py`).
        """
        messages = chat.messages
        try:
            with _cpu_limit(MAX_RENDER_S):
                if "tools" not in self.variables:
                    messages = as_plain_messages(messages, chat.tools)
                text = self._template.render(
                    **{
                        **self._special_tokens,
                        **chat.template_kwargs,
                        "messages": messages,
                        "tools": chat.tools,
                        "documents": None,
                        "add_generation_prompt": chat.add_generation_prompt,
                    }
                )
        # A template may fail in any way that a program can.
        except Exception as error:
            raise invalid(f"the chat template cannot render these messages: {error}", "messages") from error
        return _cut_after(text, messages[-1]) if chat.continue_final_message else text


def load_chat_template(folder: str, override: str | None) -> ChatTemplate | None:
    """The model's template (`chat_template.jinja` or tokenizer_config.json), or the source given; None if none."""
    path = Path(folder)
    config_path = path / "tokenizer_config.json"
    config = json.loads(config_path.read_text("utf-8")) if config_path.exists() else {}
    source = override
    if source is None and (path / "chat_template.jinja").exists():
        source = (path / "chat_template.jinja").read_text("utf-8")
    if source is None:
        source = config.get("chat_template")
    if isinstance(source, list):  # several by name; the plain chat is called "default"
        source = next((item["template"] for item in source if item["name"] == "default"), None)
    return None if source is None else ChatTemplate(source, special_tokens(config))


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like in tokenizer_config.json, which templates write themselves."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


@contextlib.contextmanager
def _cpu_limit(limit_s: float) -> Iterator[None]:
    """Raises TimeoutError out of the block. Only in the main thread, where Python runs its signal handlers."""

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"it took more than {limit_s:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _cut_after(text: str, message: dict[str, Any]) -> str:
    """Drop what the template puts after the last message, so that the model goes on with it."""
    content = message.get("content")
    final = content.strip() if isinstance(content, str) else ""
    at = text.rfind(final) if final else -1
    if at < 0:
        words = "continue_final_message needs a last message with text that the chat template keeps"
        raise invalid(words, "continue_final_message")
    end = at + len(final)
    # A template that keeps white space as it is: so do we.
    trailing = content[len(content.rstrip()) :] if isinstance(content, str) else ""
    return text[: end + len(trailing)] if text[end:].startswith(trailing) else text[:end]


def _to_json(value: object, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """Without Jinja's HTML escapes."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's own words for training; here it renders its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
