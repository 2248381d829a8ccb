"""What a tokenizer worker needs to know, resolved by the launcher and frozen."""

import msgspec


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`tokenizer_dir` holds tokenizer.json and tokenizer_config.json. `chat_template` is the Jinja source that the
    user gave in place of the model's own, if any. `context_length` bounds prompt and output together.
    `lowercase`: texts to be embedded are first put in lower case."""

    tokenizer_dir: str
    context_length: int
    vocab_size: int
    chat_template: str | None = None
    lowercase: bool = False
