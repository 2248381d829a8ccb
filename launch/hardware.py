"""What this machine can compute with, found out without importing torch (the launcher never does)."""

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
    return not hidden and any(path.exists() for path in _NVIDIA_DRIVER) and _torch_has_cuda()


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda\b[^=]*= *['\"]", text, re.MULTILINE) is not None
