"""The offline API with a model that embeds, in an engine of its own."""

from pathlib import Path

import numpy as np
import pytest
from support.offline import nothing_left
from support.tiny_embedders import make_tiny_embedder

from ramet import Engine, RequestError

pytestmark = pytest.mark.e2e


def test_an_engine_that_embeds(tmp_path: Path) -> None:
    with nothing_left(), Engine(make_tiny_embedder("bert", tmp_path)) as engine:
        one, several = engine.embed("Paris"), engine.embed(["Paris", "Rome"] * 20)
        assert (one.shape, several.shape, one.dtype) == ((64,), (40, 64), np.float32)
        assert np.array_equal(several[::2], np.stack([one] * 20))
        assert np.linalg.norm(several, axis=1) == pytest.approx(1)
        with pytest.raises(RequestError, match="maximum context length is 130 tokens; the input has 131 tokens"):
            engine.embed([[5] * 131])
        with pytest.raises(RequestError, match="this server embeds; one without --is-embedding generates"):
            engine.generate("Rome")
