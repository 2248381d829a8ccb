"""What this machine can compute with, found out without importing torch (the launcher never does)."""

import ctypes
import importlib.util
import os
import re
from pathlib import Path

_BFLOAT16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's name
_NVIDIA_DRIVER = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return found is not None and not _BFLOAT16_CPU_FLAGS.isdisjoint(found.group(1).split())


def cuda_is_usable() -> bool:
    """Whether there is an NVIDIA driver, a device that is not hidden, and a torch that was built for CUDA."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    return not hidden and any(path.exists() for path in _NVIDIA_DRIVER) and _torch_has("cuda")


def why_no_cuda() -> str | None:
    """What keeps `--device cuda` from working on this machine, where that is certain."""
    if not _torch_has("cuda|hip"):  # AMD's devices go by CUDA's name
        return "the torch that is installed was built without CUDA"
    try:
        # Some systems tell only torch where the library is; others have it, and none of the files.
        if not any(path.exists() for path in _NVIDIA_DRIVER) and not _torch_has("hip"):
            ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"there is no NVIDIA driver ({error})"
    return None


def _torch_has(platforms: str) -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return re.search(rf"^(?:{platforms})\b[^=]*= *['\"]", text, re.MULTILINE) is not None
