"""Attention backends by the name that `--attention-backend` takes. Those for CUDA are imported when chosen: triton is
of no use on a CPU, and flash-attention may not be there."""

import logging

import torch

from ramet.kernels.cpu.build import KernelUnavailable
from ramet.model_runner.attention.base import AttentionBackend
from ramet.model_runner.attention.cpu_backend import CpuBackend
from ramet.model_runner.attention.torch_backend import TorchBackend

logger = logging.getLogger(__name__)

_CUDA_BACKENDS = ("triton", "fa3", "flashinfer")
_PACKAGES = {"fa3": "tokenspeed-fa3", "flashinfer": "flashinfer-python"}
_NAMES = f"auto, cpu, torch, {', '.join(_CUDA_BACKENDS)}"


def make_backend(name: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """`auto` takes the Triton kernel on CUDA, the C kernel on a CPU where it can be built, else plain torch.

    Raises ValueError, with words for the user, for a backend that is not known or does not work here.
    """
    if name == "torch":
        return TorchBackend()
    if name in _CUDA_BACKENDS or (name == "auto" and device.type == "cuda"):
        return _cuda_backend(name, device, dtype)
    if name not in ("auto", "cpu"):
        raise ValueError(f"attention backend {name!r} is not known; there are: {_NAMES}")
    try:
        if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
            raise KernelUnavailable(
                f"the cpu backend works on a CPU in bfloat16 or float32, not on {device} in {dtype}"
            )
        return CpuBackend()
    except KernelUnavailable as error:
        if name == "cpu":
            raise ValueError(str(error)) from error
        logger.warning("attention backend: torch (%s)", error)
        return TorchBackend()


def _cuda_backend(name: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    if device.type != "cuda":
        raise ValueError(f"the {name} backend works on CUDA, not on {device}")
    if name == "fa3" and (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        raise ValueError(f"the fa3 backend needs an H100 or H200 (sm_90), not sm_{capability[0]}{capability[1]}")
    if name in _PACKAGES and dtype is torch.float32:
        raise ValueError(f"the {name} backend needs a half type, not {dtype}")
    try:
        if name == "fa3":
            from ramet.model_runner.attention.fa3_backend import Fa3Backend

            return Fa3Backend()
        if name == "flashinfer":
            from ramet.model_runner.attention.flashinfer_backend import FlashInferBackend

            return FlashInferBackend(device)
    except ImportError as error:
        raise ValueError(f"the {name} backend needs a package: pip install {_PACKAGES[name]} ({error})") from error
    from ramet.model_runner.attention.triton_backend import TritonBackend

    return TritonBackend.on(device)
