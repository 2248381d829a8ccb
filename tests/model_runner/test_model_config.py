"""What transformers makes of a config.json, asked and remembered."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from support.model_driver import runner_config
from support.tiny_models import make_tiny_model

from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.models import model_config
from ramet.model_runner.models.model_config import read_config
from ramet.model_runner.weights.errors import WeightsError

# Loads a model and says which of the libraries that are slow to import it took.
_LOAD = """
import sys
import msgspec
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.models.loader import load_model
from ramet.model_runner.parallel import TpGroup
load_model(msgspec.json.decode(sys.argv[1], type=RunnerConfig), TpGroup(), lambda done, total: None)
print(*sorted({"transformers", "sympy", "torch._dynamo"} & sys.modules.keys()))
"""


@pytest.fixture
def config(tmp_path: Path) -> RunnerConfig:
    model = make_tiny_model("gemma3", tmp_path / "model")
    return runner_config(model, config_cache=str(tmp_path / "cache" / "configs"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunnerConfig]:
    """How often transformers was asked, a config for each time."""
    asked: list[RunnerConfig] = []
    ask = model_config._ask_transformers
    monkeypatch.setattr(model_config, "_ask_transformers", lambda config: asked.append(config) or ask(config))
    return asked


def change(config: RunnerConfig, **values: object) -> None:
    path = Path(config.model_dir) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))


def test_it_is_asked_once(config: RunnerConfig, asked: list[RunnerConfig]) -> None:
    first = read_config(config)
    assert first.causal_lm == "Gemma3ForCausalLM" and first.rope_parameters.keys() == set(first.layer_types)
    assert read_config(config) == first == read_config(runner_config(Path(config.model_dir)))
    assert len(asked) == 2  # the last was told no folder to keep it in


@pytest.mark.parametrize("name", ["config.json", "config.4.0.0.json"])
def test_another_content_is_another_config(name: str, config: RunnerConfig, asked: list[RunnerConfig]) -> None:
    assert read_config(config).rms_norm_eps != 0.25
    changed = {**json.loads((Path(config.model_dir) / "config.json").read_bytes()), "rms_norm_eps": 0.25}
    change(config, configuration_files=["config.4.0.0.json"])
    (Path(config.model_dir) / name).write_text(json.dumps(changed))
    assert read_config(config).rms_norm_eps == 0.25
    assert len(asked) == 2


def test_names_that_a_class_maps(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "distilbert", "vocab_size": 100, "dim": 24, "n_heads": 4, "n_layers": 3}))
    found = read_config(runner_config(folder))
    assert (found.hidden_size, found.num_attention_heads, found.num_hidden_layers) == (24, 4, 3)
    assert found.causal_lm is None


def test_what_depends_on_more_than_the_file_is_not_kept(
    config: RunnerConfig, asked: list[RunnerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting = runner_config(Path(config.model_dir), config_cache=config.config_cache, trust_remote_code=True)
    for _ in range(2):
        read_config(trusting)
    assert len(asked) == 2
    path = Path(config.model_dir) / "config.json"
    path.write_text(path.read_text().replace('"model_type"', '"type"'))
    path.with_name("config_sentence_transformers.json").write_text('{"model_type": "SentenceTransformer"}')
    with pytest.raises(WeightsError, match="cannot be used"):
        read_config(config)
    # Other versions of transformers take the type from the path.
    monkeypatch.setattr(model_config, "_ask_transformers", lambda config: {"model_type": "gemma3_text"})
    assert read_config(config).model_type == "gemma3_text"
    assert not Path(config.config_cache or "").exists()


def test_a_file_cut_short_is_written_anew(config: RunnerConfig, asked: list[RunnerConfig]) -> None:
    first = read_config(config)
    (kept,) = Path(config.config_cache or "").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert read_config(config) == first == read_config(config)
    assert len(asked) == 2


def test_a_folder_that_cannot_be_written(config: RunnerConfig, caplog: pytest.LogCaptureFixture) -> None:
    Path(config.config_cache or "").parent.write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert read_config(config).causal_lm == "Gemma3ForCausalLM"
    assert "each start will be slower by some seconds" in caplog.text


def test_a_known_model_is_loaded_without_transformers(tmp_path: Path) -> None:
    config = runner_config(make_tiny_model("qwen3", tmp_path / "model"), config_cache=str(tmp_path / "configs"))
    read_config(config)
    command = [sys.executable, "-c", _LOAD, msgspec.json.encode(config).decode()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
