"""The bodies of `/tokenize` and `/detokenize`: a text or a conversation, and token ids."""

from typing import Any

import msgspec

from ramet.frontend.schemas.chat import ChatMessage
from ramet.frontend.schemas.common import Int
from ramet.ipc.errors import invalid
from ramet.ipc.messages import Chat, Job
from ramet.ipc.sampling import SamplingParams

_CHAT_ONLY = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`add_special_tokens` is for a text (true unless said otherwise): a chat template writes them itself."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def what(self) -> str | Chat:
        """What to tokenize. Raises `RequestError` for fields that do not go together."""
        if self.messages is not None:
            return self._chat(self.messages)
        for name in _CHAT_ONLY:
            if getattr(self, name) is not None:
                raise invalid(f"{name} is only allowed with messages", name)
        if self.prompt is None:
            raise invalid("give either prompt or messages", "prompt", "missing_required_parameter")
        return self.prompt

    def _chat(self, messages: list[ChatMessage]) -> Chat:
        if not messages:
            raise invalid("messages must not be empty", "messages")
        for name in ("prompt", "add_special_tokens"):
            if getattr(self, name):
                raise invalid(f"{name} is not allowed with messages", name)
        opens, continues = self.add_generation_prompt, bool(self.continue_final_message)
        if opens and continues:
            raise invalid(
                "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
            )
        return Chat(
            Job([], SamplingParams()),
            [message.for_template(f"messages[{index}]") for index, message in enumerate(messages)],
            self.tools,
            self.chat_template_kwargs or {},
            add_generation_prompt=not continues if opens is None else opens,
            continue_final_message=continues,
        )


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`skip_special_tokens` is false unless said otherwise, so that a text comes back as it was."""

    tokens: list[Int]
    model: str | None = None
    skip_special_tokens: bool | None = None
