"""The bodies of `/tokenize` and `/detokenize`: a text or a conversation, and token ids."""

from typing import Any

import msgspec

from ramet.frontend.config import FrontendConfig
from ramet.frontend.schemas.chat import ChatMessage, ChatRequest
from ramet.frontend.schemas.common import Int
from ramet.frontend.schemas.tools import Tool
from ramet.ipc.errors import invalid
from ramet.ipc.messages import Chat, Job
from ramet.ipc.sampling import SamplingParams

CHAT_ONLY = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`add_special_tokens` is for a text (true unless said otherwise): a chat template writes them itself."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def what(self, config: FrontendConfig) -> str | Chat:
        """What to tokenize. Raises `RequestError` for fields that do not go together."""
        chat = {name: getattr(self, name) for name in CHAT_ONLY if getattr(self, name) is not None}
        if self.messages is None:
            for name in chat:
                raise invalid(f"{name} is only allowed with messages", name)
            if self.prompt is None:
                raise invalid("give either prompt or messages", "prompt", "missing_required_parameter")
            return self.prompt
        for name in ("prompt", "add_special_tokens"):
            if getattr(self, name):
                raise invalid(f"{name} is not allowed with messages", name)
        request = ChatRequest(model="", messages=self.messages, **chat)
        request.check()
        return request.prompt(config)(Job([], SamplingParams()))


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`skip_special_tokens` is false unless said otherwise, so that a text comes back as it was."""

    tokens: list[Int]
    model: str | None = None
    skip_special_tokens: bool | None = None
