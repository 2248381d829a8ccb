"""`POST /tokenize` and `/detokenize`: the model's tokenizer and chat template for the asking, without generating.

A detokenized text comes back as `prompt` and as `text`: clients of vLLM read the one, those of SGLang the other.
"""

from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ramet.frontend.api.models import Models
from ramet.frontend.config import FrontendConfig
from ramet.frontend.engine_client import EngineClient
from ramet.frontend.exchange import json_response, read_json, time_limit, while_connected
from ramet.frontend.schemas.common import check_token_ids
from ramet.frontend.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from ramet.ipc.messages import Answer, Detokenize, Detokenized, Tokenize, Tokenized


class Tokens:
    def __init__(self, config: FrontendConfig, client: EngineClient, models: Models) -> None:
        self._config = config
        self._client = client
        self._models = models
        self._tokenize = msgspec.json.Decoder(TokenizeRequest)
        self._detokenize = msgspec.json.Decoder(DetokenizeRequest)

    async def tokenize(self, http: Request) -> Response:
        request = await read_json(http.scope, http.receive, self._tokenize, self._config.max_body_bytes)
        self._models.check(request.model)
        what = request.what()
        answer = await self._ask(http, lambda rid: Tokenize(rid, what, request.add_special_tokens is not False))
        assert isinstance(answer, Tokenized)
        tokens = answer.token_ids
        body = {"tokens": tokens, "count": len(tokens), "max_model_len": self._config.context_length}
        return json_response({**body, "token_strs": answer.tokens} if request.return_token_strs else body)

    async def detokenize(self, http: Request) -> Response:
        request = await read_json(http.scope, http.receive, self._detokenize, self._config.max_body_bytes)
        self._models.check(request.model)
        check_token_ids(request.tokens, self._config.vocab_size, "tokens")
        skips = bool(request.skip_special_tokens)
        answer = await self._ask(http, lambda rid: Detokenize(rid, request.tokens, skips))
        assert isinstance(answer, Detokenized)
        return json_response({"prompt": answer.text, "text": answer.text})

    async def _ask(self, http: Request, make: Callable[[str], Tokenize | Detokenize]) -> Answer:
        limit_s = time_limit(http.scope, self._config.request_timeout_s)
        return await while_connected(http.receive, self._client.ask(make), limit_s)
