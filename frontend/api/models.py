"""`GET /v1/models` and `/v1/models/{model}`."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ramet.frontend.config import FrontendConfig
from ramet.frontend.errors import no_such_model


class Models:
    """One model under each of its served names; its path is accepted as a name too."""

    def __init__(self, config: FrontendConfig) -> None:
        self._config = config
        self._created = int(time.time())

    async def list(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._config.served_names]})

    async def retrieve(self, request: Request) -> Response:
        model = request.path_params["model"]
        if not self._config.serves(model):
            raise no_such_model(model)
        return JSONResponse(self._card(model))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "ramet",
            "root": self._config.model_path,
            "max_model_len": self._config.context_length,
        }
