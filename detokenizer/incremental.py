"""`IncrementalText`: one request's tokens become text, never half a character, up to a stop string.

Works on bytes: each token has its own (`Tokenizer.token_bytes`), and an incremental UTF-8 decoder holds back what is
not a whole character yet. So the cost of a token does not grow with the text.
"""

import codecs

from ramet.detokenizer.stop import StopMatcher
from ramet.ipc.messages import Finish
from ramet.ipc.sampling import SamplingParams
from ramet.tokenizer_worker.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalText:
    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip_special = params.skip_special_tokens
        self._keep_match = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._stop = StopMatcher(params.stop, self._keep_match)
        self._utf8 = _Utf8Decoder(errors="replace")
        self.num_tokens = 0

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stop.matched

    def add(self, token_id: int | None, finish: Finish | None) -> str:
        """The text that is certain now. With `finish`, the token is the last one, or none has come, and nothing is held
        back; a token that ended the request by being a stop token is not text (unless stop strings are to be kept)."""
        hidden = finish is not None and finish.matched is not None and not self._keep_match
        data = b""
        if token_id is not None:
            self.num_tokens += 1
            if not hidden and not (self._skip_special and token_id in self._tokenizer.special_ids):
                data = self._tokenizer.token_bytes(token_id)
        text = self._utf8.decode(data, final=finish is not None)
        if self.num_tokens < self._min_tokens:
            return text  # too early for any stop string
        text = self._stop.feed(text)
        return text + self._stop.flush() if finish is not None else text
