"""`GET /v1/models` and `/v1/models/{model}`, and the check of the `model` field that every endpoint makes."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ramet.frontend.config import FrontendConfig
from ramet.frontend.errors import ModelNotFoundError


class Models:
    """One model under each of its served names; its path is accepted as a name too."""

    def __init__(self, config: FrontendConfig) -> None:
        self._config = config
        self._created = int(time.time())

    def check(self, model: str | None) -> None:
        """Raise `ModelNotFoundError` for a name that is not served; None names none."""
        if model is not None and model not in self._config.served_names and model != self._config.model_path:
            raise ModelNotFoundError(model)

    async def list(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._config.served_names]})

    async def retrieve(self, request: Request) -> Response:
        model = request.path_params["model"]
        self.check(model)
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
