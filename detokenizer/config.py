"""What the detokenizer needs to know, resolved by the launcher and frozen."""

import msgspec


class DetokenizerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`tokenizer_dir` holds tokenizer.json. `stream_interval`: send text every so many tokens of a request."""

    tokenizer_dir: str
    stream_interval: int = 1
