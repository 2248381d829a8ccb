"""`POST /tokenize` and `/detokenize`: the model's tokenizer and chat template for the asking, without generating.

A detokenized text comes back as `prompt` and as `text`: clients of vLLM read the one, those of SGLang the other.
"""

from typing import Any

from starlette.requests import Request

from ramet.frontend.api.base import Api
from ramet.frontend.schemas.common import check_token_ids
from ramet.frontend.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from ramet.ipc.messages import Detokenize, Tokenize


class Tokens(Api):
    async def tokenize(self, http: Request, request: TokenizeRequest) -> dict[str, Any]:
        what = request.what(self._config)
        [answer] = await self._ask(http, [lambda rid: Tokenize(rid, what, request.add_special_tokens is not False)])
        tokens = answer.token_ids
        body = {"tokens": tokens, "count": len(tokens), "max_model_len": self._config.context_length}
        return {**body, "token_strs": answer.tokens} if request.return_token_strs else body

    async def detokenize(self, http: Request, request: DetokenizeRequest) -> dict[str, Any]:
        check_token_ids(request.tokens, self._config.vocab_size, "tokens")
        skips = bool(request.skip_special_tokens)
        [answer] = await self._ask(http, [lambda rid: Detokenize(rid, request.tokens, skips)])
        return {"prompt": answer.text, "text": answer.text}
