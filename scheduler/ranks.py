"""Tensor-parallel ranks as a scheduler process sees them: `lead` on rank 0, `join` on the others.

They agree before any weight is read that they run the same versions, settings and model, and only then open their
collectives. Afterwards rank 0 sends each plan before it executes the same. A rank that cannot go on exits: the others
notice by the channel or in a collective, and exit as well, since nobody can say what their memory holds.
"""

import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

import ramet
from ramet.ipc.channel import ChannelError, PeerLost, RankClient, RankServer
from ramet.ipc.ranks import Execute, Hello, Ping, Refused, ToRank, Welcome
from ramet.ipc.step import StepPlan
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.memory import PoolTooLarge
from ramet.model_runner.parallel import TpGroup, connect, use_device
from ramet.model_runner.weights.errors import WeightsError
from ramet.scheduler.config import TpConfig

# What keeps a rank from being set up; the messages are for the user.
SETUP_ERRORS = (WeightsError, PoolTooLarge, ValueError, ChannelError, PeerLost, dist.DistError)
_TAIL_BYTES = 64 * 1024


class Ranks:
    """The other ranks, from rank 0; there may be none."""

    def __init__(self, config: TpConfig, server: RankServer[Hello] | None, peers: list[bytes], group: TpGroup) -> None:
        self._server = server
        self._peers = peers
        self.group = group
        self.num_peers = len(peers)
        self._is_remote = bool(config.host)  # those on this machine are watched by the launcher

    def send(self, plan: StepPlan) -> None:
        """Have the others execute it too. Raises PeerLost."""
        if self._server is not None:
            self._server.send(self._peers, Execute(plan))

    def check(self) -> None:
        """While idle: raises PeerLost if one on another machine is not there any more."""
        if self._server is not None and self._is_remote:
            self._server.send(self._peers, Ping())


def lead(config: TpConfig, runner: RunnerConfig, progress: Callable[[str], None]) -> Ranks:
    """Wait for all other ranks, and open the collectives. Raises one of SETUP_ERRORS."""
    if config.size == 1:
        return Ranks(config, None, [], TpGroup())
    use_device(runner)
    server = RankServer[Hello](config.address, config.secret, Hello)
    facts = rank_facts(runner)
    peers: dict[int, bytes] = {}
    while missing := sorted(set(range(1, config.size)) - peers.keys()):
        progress(f"waiting at {config.address} for ranks {', '.join(map(str, missing))}")
        peer, hello = server.receive()
        # Another machine may have been started again meanwhile.
        peers = {rank: known for rank, known in peers.items() if _is_there(server, known)}
        if refusal := _refusal(hello, facts, set(range(1, config.size)) - peers.keys()):
            server.send([*peers.values(), peer], Refused(refusal))
            server.close()
            raise ValueError(refusal)
        peers[hello.rank] = peer
    store: dist.Store
    if config.host:
        store = dist.TCPStore(config.host, 0, config.size, is_master=True, wait_for_workers=False)
        place = f"{config.host}:{store.port}"
    else:
        # Of a name of its own, since ranks may start again in the same folder.
        place = f"{config.address.removeprefix('ipc://')}-{secrets.token_hex(4)}"
        store = dist.FileStore(place, config.size)
    server.send(peers.values(), Welcome(place))
    return Ranks(config, server, list(peers.values()), _open(config, runner, store))


def join(config: TpConfig, runner: RunnerConfig, progress: Callable[[str], None]) -> tuple[RankClient[ToRank], TpGroup]:
    """Connect to rank 0, who may not be there yet, and open the collectives. Raises one of SETUP_ERRORS."""
    use_device(runner)
    link = RankClient[ToRank](config.address, config.secret, ToRank)
    progress(f"waiting for rank 0 at {config.address}")
    link.send(Hello(config.rank, rank_facts(runner)))
    while isinstance(answer := link.receive(), Ping):
        pass  # rank 0 waits for others
    if isinstance(answer, Refused):
        raise ValueError(answer.message)
    assert isinstance(answer, Welcome)
    if config.host:
        host, _, port = answer.store.rpartition(":")
        return link, _open(config, runner, dist.TCPStore(host, int(port), config.size))
    return link, _open(config, runner, dist.FileStore(answer.store, config.size))


def _is_there(server: RankServer[Hello], peer: bytes) -> bool:
    try:
        server.send([peer], Ping())
    except PeerLost:
        return False
    return True


def _open(config: TpConfig, runner: RunnerConfig, store: dist.Store) -> TpGroup:
    host = config.host or "127.0.0.1"
    return connect(config.rank, config.size, store, host, runner.device, config.setup_timeout_s)


def _refusal(hello: Hello, facts: dict[str, str], missing: set[int]) -> str | None:
    if hello.rank not in missing:
        return f"two ranks say that they are rank {hello.rank}: is --node-rank the same on two machines?"
    differing = [
        f"{name} ({hello.facts.get(name)}, on rank 0 {value})"
        for name, value in facts.items()
        if hello.facts.get(name) != value
    ]
    return f"rank {hello.rank} cannot work with rank 0: other {', '.join(differing)}" if differing else None


def rank_facts(runner: RunnerConfig) -> dict[str, str]:
    """What all ranks must have in common. Paths may differ, what they hold must not."""
    settings = msgspec.to_builtins(runner)
    model_dir, weights = (Path(settings.pop(name)) for name in ("model_dir", "weights"))
    del settings["device_index"]
    return {
        "ramet version": ramet.__version__,
        "torch version": str(torch.__version__),
        "config.json": hashlib.sha256((model_dir / "config.json").read_bytes()).hexdigest()[:16],
        "weight files": _fingerprint(weights),
        **{name: str(value) for name, value in settings.items()},
    }


def _fingerprint(weights: Path) -> str:
    """Of the weight files' names, sizes and last 64 KiB, which hold tensors and not the header."""
    files = [weights] if weights.is_file() else sorted(weights.glob("*.safetensors")) + sorted(weights.glob("*.bin"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return digest.hexdigest()[:16]
