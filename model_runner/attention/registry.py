"""Attention backends by the name that `--attention-backend` takes."""

import logging

import torch

from ramet.kernels.cpu.build import KernelUnavailable
from ramet.model_runner.attention.base import AttentionBackend
from ramet.model_runner.attention.cpu_backend import CpuBackend
from ramet.model_runner.attention.torch_backend import TorchBackend

log = logging.getLogger(__name__)


def make_backend(name: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """`auto` takes the C kernel on a CPU where it can be built, else plain torch.

    Raises ValueError, with words for the user, for a backend that is not known or does not work here.
    """
    if name == TorchBackend.name:
        return TorchBackend()
    if name not in ("auto", CpuBackend.name):
        raise ValueError(f"attention backend {name!r} is not known; there are: auto, cpu, torch")
    try:
        if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
            raise KernelUnavailable(
                f"the cpu backend works on a CPU in bfloat16 or float32, not on {device} in {dtype}"
            )
        return CpuBackend()
    except KernelUnavailable as error:
        if name == CpuBackend.name:
            raise ValueError(str(error)) from error
        log.log(logging.WARNING if device.type == "cpu" else logging.INFO, "attention backend: torch (%s)", error)
        return TorchBackend()
