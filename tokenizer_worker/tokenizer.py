"""`Tokenizer`: text to token ids and back, from a model's tokenizer.json.

Wraps the `tokenizers` library; neither torch nor transformers is imported, which keeps the processes that use it small.
Shared with the detokenizer. Does not know chats (`chat_template.py`) or requests.
"""

import json
import logging
from pathlib import Path
from typing import Any

import tokenizers

log = logging.getLogger(__name__)


class TokenizerError(Exception):
    """The tokenizer's files are missing or cannot be used; the message names the file."""


class Tokenizer:
    """`special_ids` are the tokens that are not text (skipped in output unless asked)."""

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
        self._bytes = _ByteDecoder(json.loads(self._tokenizer.to_str()).get("decoder"))

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """`add_special_tokens`: also what the model expects around a plain text (a BOS token, mostly)."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, spelling: str) -> int | None:
        """The id of a token of the vocabulary."""
        return self._tokenizer.token_to_id(spelling)

    def spelling(self, token_id: int) -> str:
        """A token as the vocabulary spells it; empty for an id that it does not have."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text: maybe a part of a character, and for a special token its name.

        Empty for an id that the vocabulary does not have (models pad their embedding).
        """
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else self._bytes.decode(token)


class _ByteDecoder:
    """From a token as the vocabulary spells it to its bytes, for the ways of spelling that tokenizer.json knows:
    byte-level (GPT-2's alphabet), metaspace with byte fallback (SentencePiece), suffixed words (BPEDecoder), and words
    whose later pieces have a prefix (WordPiece)."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        parts = [] if decoder is None else decoder.get("decoders", [decoder])
        kinds = {part["type"] for part in parts}
        self._alphabet = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._replacements = [
            (part["pattern"].get("String", ""), part["content"]) for part in parts if part["type"] == "Replace"
        ]
        self._piece_prefix = next((part["prefix"] for part in parts if part["type"] == "WordPiece"), None)
        for part in parts:
            if part["type"] == "Metaspace":
                self._replacements.append((part.get("replacement", "▁"), " "))
            elif part["type"] == "BPEDecoder":
                self._replacements.append((part.get("suffix", "</w>"), " "))
        unknown = kinds - {
            "ByteLevel",
            "ByteFallback",
            "Replace",
            "Metaspace",
            "BPEDecoder",
            "WordPiece",
            "Fuse",
            "Strip",
        }
        if unknown:
            log.warning("tokenizer decoder %s is not known: tokens are taken as they are spelled", sorted(unknown))

    def decode(self, token: str) -> bytes:
        if self._alphabet is not None:
            codes = [self._alphabet.get(char) for char in token]
            # A character outside the alphabet: the token stands for itself.
            return token.encode() if None in codes else bytes(c for c in codes if c is not None)
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        if self._piece_prefix is not None:
            token = token.removeprefix(self._piece_prefix) if token.startswith(self._piece_prefix) else f" {token}"
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for their own byte, the other bytes follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
