"""The bodies of `POST /v1/embeddings`, `/v1/score` and `/v1/rerank`.

`user` cannot change an answer and is accepted. Scores are cosine similarities, so the last two take texts only.
"""

from typing import Literal

import msgspec

from ramet.frontend.config import FrontendConfig
from ramet.frontend.schemas.common import Int, as_prompts
from ramet.ipc.errors import invalid

MAX_INPUTS = 2048


class EmbeddingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the three have in common."""

    model: str
    user: str | None = None
    priority: Int | None = None


class EmbeddingRequest(EmbeddingFields, kw_only=True, forbid_unknown_fields=True):
    input: str | list[str | Int | list[Int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int | None = None

    def inputs(self, vocab_size: int) -> list[str | list[int]]:
        """One text or list of token ids per embedding. Raises `RequestError`."""
        inputs = as_prompts(self.input, "input", vocab_size)
        _check_count(len(inputs), "input")
        return inputs

    def check_dimensions(self, config: FrontendConfig) -> None:
        if self.dimensions is None:
            return
        size, lengths = config.embedding_size, config.dimensions
        if lengths is None:
            words = f"this model's embeddings have {size} dimensions and cannot be cut: it is not a Matryoshka model"
            raise invalid(f"{words}, got dimensions {self.dimensions}", "dimensions")
        if not 1 <= self.dimensions <= size or (lengths and self.dimensions not in lengths):
            known = f"one of {', '.join(map(str, lengths))}" if lengths else f"between 1 and {size}"
            raise invalid(f"dimensions must be {known}, got {self.dimensions}", "dimensions")


class ScoreRequest(EmbeddingFields, kw_only=True, forbid_unknown_fields=True):
    """Each text of `text_1` with that of `text_2` in its place; a single `text_1` with each of `text_2`."""

    text_1: str | list[str]
    text_2: str | list[str]

    def pairs(self) -> tuple[list[str], list[str]]:
        first, second = _texts(self.text_1, "text_1"), _texts(self.text_2, "text_2")
        if len(first) not in (1, len(second)):
            raise invalid(f"text_1 must hold one text or as many as text_2 ({len(second)}), got {len(first)}", "text_1")
        return first, second


class RerankRequest(EmbeddingFields, kw_only=True, forbid_unknown_fields=True):
    """`top_n`: only so many of the best documents are returned."""

    query: str
    documents: list[str]
    top_n: Int | None = None
    return_documents: bool | None = None

    def check(self) -> None:
        _texts(self.query, "query")
        _texts(self.documents, "documents")
        if self.top_n is not None and self.top_n < 1:
            raise invalid(f"top_n must be at least 1, got {self.top_n}", "top_n")


def _texts(value: str | list[str], param: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not texts or not all(texts):
        raise invalid(f"{param} must not be empty", param)
    _check_count(len(texts), param)
    return texts


def _check_count(count: int, param: str) -> None:
    if count > MAX_INPUTS:
        raise invalid(f"{param} must hold at most {MAX_INPUTS} items, got {count}", param)
