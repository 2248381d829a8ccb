"""`TpGroup`: the ranks that share one model, and the collectives between them: gloo on CPUs, NCCL on CUDA.

Layers are written against it; a group of one does nothing. Knows neither plans nor how the ranks find each other: a
store is given. All ranks must call the same collectives in the same order. If a rank dies, the next collective of the
others raises, at once with gloo, and at the latest after `TIMEOUT_S`.
"""

import dataclasses
import datetime
import logging
import os
import socket

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ramet.model_runner.config import RunnerConfig

logger = logging.getLogger(__name__)

# Ranks execute the same plan at the same time: within a step one waits for another as long as their speeds differ.
TIMEOUT_S = 60.0
# Up to here, reading all ranks' memory at once is faster than NCCL's ring, which is bound by its steps.
_ONE_SHOT_BYTES = 256 * 1024
# torch 2.13 has given it another name.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclasses.dataclass(frozen=True)
class TpGroup:
    """This process is `rank` of `size`. Made by `connect` if there is more than one."""

    rank: int = 0
    size: int = 1
    setup: dist.ProcessGroup | None = None
    one_shot: "OneShot | None" = None

    def shard(self, total: int, what: str, *, replicated: bool = False) -> range:
        """The slice of `total` equal units that this rank owns; with `replicated`, neighbouring ranks may share one.

        Raises ValueError if they cannot be split evenly."""
        if replicated and total < self.size and self.size % total == 0:
            first = self.rank * total // self.size
            return range(first, first + 1)
        if total % self.size:
            raise ValueError(f"{what} ({total}) cannot be divided over {self.size} tensor-parallel ranks")
        per_rank = total // self.size
        return range(self.rank * per_rank, (self.rank + 1) * per_rank)

    def padded_shard(self, total: int) -> range:
        """As `shard`, but the last ranks may own less than the others, or nothing."""
        per_rank = -(-total // self.size)
        return range(min(self.rank * per_rank, total), min((self.rank + 1) * per_rank, total))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks; `tensor` may be overwritten."""
        if self.size == 1:
            return tensor
        if self.one_shot is not None and self.one_shot.takes(tensor):
            return self.one_shot.all_reduce(tensor)
        dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate over ranks along the last of two dimensions."""
        if self.size == 1:
            return tensor
        rows, columns = tensor.shape
        gathered = tensor.new_empty(self.size * rows, columns)
        _all_gather(gathered, tensor.contiguous())
        return gathered.view(self.size, rows, columns).transpose(0, 1).flatten(1)

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's values, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def minimum(self, value: int) -> int:
        """The least of the ranks' values. Waits for ranks that are not yet set up."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.setup)
        return int(tensor)


class OneShot:
    """All-reduces of small messages through torch's symmetric memory: each rank writes to a buffer that all can read,
    and sums all of them itself. One kernel, usable in CUDA graphs. Raises RuntimeError where devices lack it."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        group = dist.group.WORLD
        assert group is not None
        self._group_name = group.group_name
        self._buffer = symmetric.empty(_ONE_SHOT_BYTES, dtype=torch.uint8, device=device)
        symmetric.rendezvous(self._buffer, self._group_name)
        self.all_reduce(torch.zeros(16, device=device))  # not all numbers of ranks may be supported

    def takes(self, tensor: Tensor) -> bool:
        return tensor.nbytes <= _ONE_SHOT_BYTES and tensor.dtype in (torch.float32, torch.bfloat16)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        buffer = self._buffer[: tensor.nbytes].view(tensor.dtype)
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(
            buffer, tensor.contiguous().flatten(), "sum", self._group_name
        )
        return total.view(tensor.shape)


def connect(rank: int, size: int, store: dist.Store, host: str, device: str, setup_timeout_s: float) -> TpGroup:
    """Join the others, who meet in `store` and reach each other the way that leads to `host`.

    Raises RuntimeError (or its subclass DistError) if they do not all come within the timeout.
    """
    # Else gloo takes the interface of the machine's name, which others may not be able to reach, or should not.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_towards(host))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",  # gloo tries the way to the others at once
        store=store,
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    # Loading takes the ranks different times.
    setup = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=setup_timeout_s))
    return TpGroup(rank, size, setup, _one_shot(rank) if device == "cuda" else None)


def _one_shot(rank: int) -> OneShot | None:
    try:
        return OneShot(torch.device("cuda", torch.cuda.current_device()))
    except (RuntimeError, ImportError) as error:
        logger.log(logging.DEBUG if rank else logging.INFO, "small all-reduces go through NCCL: %s", error)
        return None


def use_device(config: RunnerConfig) -> torch.device:
    """The device, which for CUDA becomes the current one. Raises ValueError if there is none of that number."""
    if config.device == "cuda":
        if config.device_index >= (count := torch.cuda.device_count()):
            words = f"{count} are visible, counted from 0, to torch {torch.__version__}; --device cpu needs none"
            raise ValueError(f"there is no CUDA device {config.device_index}: {words}")
        torch.cuda.set_device(config.device_index)
    return torch.device(config.device)


def _interface_towards(host: str) -> str:
    """The name of the network interface from which packets to `host` leave."""
    family, _, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        own = probe.getsockname()[0]
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in entries):
            return name
    raise RuntimeError(f"no network interface has the address {own}, from which {host} is reached")
