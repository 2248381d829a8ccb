"""Makes the JSON files that a model lacks, once, in the cache: `python -m ramet.launch.prepare SOURCE`.

SOURCE is a .gguf file, which gets config.json, generation_config.json, tokenizer.json and tokenizer_config.json, or a
folder, which gets tokenizer.json if it has only a slow tokenizer or the files beside it overrule it, and a full
config.json if its own leaves needed facts to the library's defaults. A short-lived process, because it may import
transformers and with it torch.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ramet.launch.cache import ModelUnavailable, cache_folder, filling
from ramet.launch.model_info import overrides_tokenizer

# To be raised when this module makes other files of the same source, so that old ones are not used.
_FORMAT = 3
SLOW_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


def prepared_folder(source: Path, trust_remote_code: bool = False) -> Path:
    """The folder with the files made of `source`, from the cache or by the subprocess. Raises ModelUnavailable."""
    folder = _folder_for(source)
    if folder.is_dir():
        return folder
    command = [sys.executable, "-P", "-m", "ramet.launch.prepare", str(source)]
    command += ["--trust-remote-code"] if trust_remote_code else []
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ModelUnavailable(f"cannot prepare {source}: {words[-1]}")
    return folder


def _folder_for(source: Path) -> Path:
    """Keyed by path, size and time of change, so that another file under the same name is prepared anew."""
    paths = [source] if source.is_file() else sorted(source.glob("*.*"))
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps([_FORMAT, str(source.resolve()), facts]).encode()).hexdigest()[:16]
    return cache_folder() / "prepared" / f"{source.stem}-{key}"


def _prepare_gguf(source: Path, folder: Path) -> None:
    from ramet.launch import gguf_files
    from ramet.model_runner.weights.gguf_header import read_header

    header = read_header(source)
    metadata: dict[str, Any] = header.metadata
    if "tokenizer.ggml.tokens" not in metadata:
        raise ModelUnavailable("the file has no tokenizer, so it is not a language model")
    config = gguf_files.config_json(metadata, set(header.tensors))
    if config is None:
        config = _config_by_transformers(source, metadata) | {"dtype": gguf_files.dtype_name(metadata)}
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", gguf_files.generation_json(metadata))
    tokenizer = gguf_files.tokenizer(metadata)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        from transformers import AutoTokenizer

        if not metadata.get("tokenizer.ggml.add_space_prefix", True) and "gemma" not in config["model_type"]:
            raise ModelUnavailable(
                "transformers overlooks its add_space_prefix; give the tokenizer with --tokenizer-path"
            )
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # it goes into tokenizer_config.json
    _write(folder / "tokenizer_config.json", gguf_files.tokenizer_config_json(metadata))


def _config_by_transformers(source: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from ramet.launch.gguf_files import refuse_unread

    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not isinstance(architecture, str):
        raise ModelUnavailable(f"architecture {config.model_type!r} is not one of a language model")
    found = {**config.to_dict(), "architectures": [architecture]}
    keys: Any = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text"), {})
    refuse_unread(metadata, found, {key for key, name in keys.items() if name is not None})
    return found


def _prepare_folder(source: Path, folder: Path, trust_remote_code: bool) -> None:
    from transformers import AutoConfig, AutoTokenizer

    if (source / "config.json").exists():
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        _write(folder / "config.json", config.to_dict())
        generation = source / "generation_config.json"
        if generation.exists():
            (folder / generation.name).write_bytes(generation.read_bytes())
    is_fast = (source / "tokenizer.json").exists()
    if not (overrides_tokenizer(source) if is_fast else any((source / name).exists() for name in SLOW_TOKENIZER_FILES)):
        return
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ModelUnavailable(f"its tokenizer {type(tokenizer).__name__} cannot be converted to tokenizer.json")
    tokenizer.save_pretrained(folder)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    source = Path(sys.argv[1])
    try:
        with filling(_folder_for(source)) as folder:
            if source.is_file():
                _prepare_gguf(source, folder)
            else:
                _prepare_folder(source, folder, trust_remote_code="--trust-remote-code" in sys.argv)
    except Exception as error:  # noqa: BLE001 - the parent shows the last line of stderr to the user
        words = " ".join(str(error).split()) or type(error).__name__
        sys.exit(words)


if __name__ == "__main__":
    main()
