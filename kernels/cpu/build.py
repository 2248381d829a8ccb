"""Builds the C kernels on first use, for this very CPU, and keeps them in the user's cache.

Seconds with any GCC-compatible compiler; without one the caller falls back to plain torch. The library's
OpenMP runtime is the one that torch has loaded: a second one would compete with it for the cores.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
# Associative math stays off: the order of additions is part of the kernels' contract.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_COMPILE_TIMEOUT_S = 120


class KernelUnavailable(Exception):
    """The kernel cannot be built here; the message says why."""


def load_kernel(name: str) -> ctypes.CDLL:
    """The compiled `name`.c of this folder. torch must have been imported before.

    The compiler is $CC or cc, the cache $XDG_CACHE_HOME/ramet/kernels. Raises KernelUnavailable.
    """
    compiler = os.environ.get("CC") or "cc"
    # All of the folder's sources, for they include one another.
    sources = [path.read_bytes() for path in sorted(_FOLDER.glob("*.[ch]"))]
    try:
        made_of = [*sources, " ".join(_FLAGS).encode(), compiler.encode(), _cpu()]
        key = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ramet" / "kernels"
        kept = cache / f"{name}-{key}.so"
        with contextlib.suppress(OSError):  # not there yet, or cut short by a full disk
            return ctypes.CDLL(str(kept))
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / kept.name
            _compile(shlex.split(compiler), _FOLDER / f"{name}.c", library)
            try:
                cache.mkdir(parents=True, exist_ok=True)
                # Under another name first: several processes may build at once.
                with tempfile.TemporaryDirectory(dir=cache) as beside:
                    library = Path(shutil.copy(library, beside)).rename(kept)
            except OSError as error:
                logger.warning("kernel %s will be compiled at each start, for it cannot be kept: %s", name, error)
            return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: there is no home
        raise KernelUnavailable(f"kernel {name}: {error}") from error


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    command = [*compiler, *_FLAGS, "-shared", "-fPIC", str(source), "-o", str(library), "-lm"]
    done = subprocess.run(command, capture_output=True, timeout=_COMPILE_TIMEOUT_S, check=False)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        raise KernelUnavailable(f"{compiler[0]} failed with status {done.returncode}: {words[-500:]}")


def _cpu() -> bytes:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()
