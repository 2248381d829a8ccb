"""`Infill`: fill-in-the-middle prompts, in the tokens that a code model was trained with.

The form is the same in all families: prefix token, text before, suffix token, text after, middle token (Bavarian et
al., "Efficient Training of Language Models to Fill in the Middle", 2022). Which family it is, the vocabulary tells.
"""

import msgspec

from ramet.tokenizer_worker.tokenizer import Tokenizer

# Prefix, suffix and middle token of each family.
_FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)
# With these, beside the three, a model ends a middle: not all of them are EOS tokens.
_ENDS = (
    "<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|file_separator|>", "<file_sep>", "<|repo_name|>", "▁<EOT>"
)  # fmt: skip
# Code Llama's tokenizer puts a space before a text. Behind this character, whose tokens are then dropped, it does not.
_SHIELD = "☺"


class Infill(msgspec.Struct, frozen=True):
    """`marks`: the ids of the prefix, suffix and middle token. `ends`: those that end the middle."""

    tokenizer: Tokenizer
    marks: tuple[int, int, int]
    ends: tuple[int, ...]
    shield: str

    def encode(self, prefix: str, suffix: str) -> list[int]:
        """The prompt whose continuation stands between the two, after what the model expects before any text."""
        first, second, third = self.marks
        start, before, shield, after = (
            self.tokenizer.encode(text, add_special_tokens=special)
            for text, special in (("", True), (prefix, False), (self.shield, False), (self.shield + suffix, False))
        )
        return [*start, first, *before, second, *after[len(shield) :], third]


def find_infill(tokenizer: Tokenizer) -> Infill | None:
    """None if the vocabulary has no such tokens."""
    ends = [i for i in map(tokenizer.token_id, _ENDS) if i is not None]
    for family in _FAMILIES:
        first, second, third = map(tokenizer.token_id, family)
        if first is not None and second is not None and third is not None:
            shield = _SHIELD if family[0].startswith("▁") else ""
            return Infill(tokenizer, (first, second, third), (*ends, first, second, third), shield)
    return None
