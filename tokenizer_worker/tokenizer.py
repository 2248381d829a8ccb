"""`Tokenizer`: text to token ids and back, from a model's tokenizer.json.

Wraps the `tokenizers` library; neither torch nor transformers is imported, which keeps the processes that use it small.
Shared with the detokenizer. Does not know chats (`chat_template.py`) or requests.
"""

import functools
import json
from pathlib import Path

import tokenizers

_KNOWN_TOKENS = 4096  # of which the bytes are kept; texts have few others


class TokenizerError(Exception):
    """The tokenizer's files are missing or cannot be used; the message names the file."""


class Tokenizer:
    """`special_ids` are the tokens that are not text (skipped in output unless asked).

    `token_bytes` gives the bytes that a token adds to the text: maybe a part of a character, and for a special token
    its name. Empty for an id that the vocabulary does not have (models pad their embedding).
    """

    def __init__(self, folder: str) -> None:
        path = Path(folder) / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # The library raises a bare Exception for whatever is wrong with the file.
        except Exception as error:
            raise TokenizerError(f"cannot read {path}: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {i: token.content for i, token in added.items()}
        self._bytes = _ByteDecoder(self._tokenizer)
        self.token_bytes = functools.lru_cache(_KNOWN_TOKENS)(self._token_bytes)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """`add_special_tokens`: also what the model expects around a plain text (a BOS token, mostly)."""
        # For one text; the only form that leaves out the offsets, which take a quarter of the time.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, spelling: str) -> int | None:
        """The id of a token of the vocabulary."""
        return self._tokenizer.token_to_id(spelling)

    def spelling(self, token_id: int) -> str:
        """A token as the vocabulary spells it; empty for an id that it does not have."""
        return self._tokenizer.id_to_token(token_id) or ""

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else self._bytes.decode(token)


class _ByteDecoder:
    """From a token as the vocabulary spells it to its bytes. Byte-level tokens (GPT-2's alphabet) and SentencePiece's
    byte tokens may be parts of characters; how others are spelled, the library's decoder knows."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        found = json.loads(tokenizer.to_str())["decoder"] or {}
        kinds = {part["type"] for part in found.get("decoders", [found] if found else [])}
        self._alphabet = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._decoder = tokenizer.decoder
        self._end = "" if self._decoder is None else self._decoder.decode(["x", "##x"])[1:]

    def decode(self, token: str) -> bytes:
        if self._alphabet is not None:
            codes = [self._alphabet.get(char) for char in token]
            # A character outside the alphabet: the token stands for itself.
            return token.encode() if None in codes else bytes(c for c in codes if c is not None)
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        if self._decoder is None:
            return token.encode()
        # Between two others: the first and the last token of a text lose spaces. "##x" continues a word of WordPiece.
        return self._decoder.decode(["x", token, "##x"])[1:].removesuffix(self._end).encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for their own byte, the other bytes follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
