"""Builds the C kernels on first use, for this very CPU, and keeps them in the user's cache.

Seconds with any GCC-compatible compiler; without one the caller falls back to plain torch. The library's
OpenMP runtime is the one that torch has loaded: a second one would compete with it for the cores.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

# Associative math stays off: the order of additions is part of the kernels' contract.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_COMPILE_TIMEOUT_S = 120


class KernelUnavailable(Exception):
    """The kernel cannot be built here; the message says why."""


def load_kernel(name: str) -> ctypes.CDLL:
    """The compiled `name`.c of this folder. torch must have been imported before.

    The compiler is $CC or cc, the cache $XDG_CACHE_HOME/ramet/kernels. Raises KernelUnavailable.
    """
    source = Path(__file__).with_name(f"{name}.c").read_bytes()
    compiler = os.environ.get("CC", "cc")
    # All of the folder's sources, for they include one another.
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.[ch]"))]
    key = hashlib.sha256(b"\0".join([*sources, " ".join(_FLAGS).encode(), compiler.encode(), _cpu()])).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ramet" / "kernels"
    library = cache / f"{name}-{key}.so"
    try:
        if not library.exists():
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelUnavailable(f"kernel {name}: {error}") from error


def _compile(compiler: str, source: bytes, library: Path) -> None:
    """Into a temporary file that is renamed: several processes may build at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, *_FLAGS, f"-I{Path(__file__).parent}", "-shared", "-fPIC", "-x", "c", "-", "-o", str(made)]
        try:
            done = subprocess.run(
                [*command, "-lm"], input=source, capture_output=True, timeout=_COMPILE_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise KernelUnavailable(f"{compiler} did not finish in {_COMPILE_TIMEOUT_S} s") from error
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip()
            raise KernelUnavailable(f"{compiler} failed with status {done.returncode}: {words[-500:]}")
        made.rename(library)


def _cpu() -> bytes:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()
