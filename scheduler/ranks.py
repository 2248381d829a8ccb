"""Tensor-parallel ranks as a scheduler process sees them: `lead` on rank 0, `join` on the others.

They agree before any weight is read that they run the same versions, settings and model, and only then open their
collectives. Afterwards rank 0 sends each plan before it executes the same. A rank that cannot go on exits: the others
notice by the channel or in a collective, and exit as well, since nobody can say what their memory holds.
"""

import contextlib
import datetime
import functools
import hashlib
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec
import torch
import torch.distributed as dist

import ramet
from ramet.ipc.channel import ChannelError, PeerLost, RankClient, RankServer
from ramet.ipc.ranks import Hello, Ping, Refused, ToRank, Welcome
from ramet.ipc.step import StepPlan
from ramet.model_runner.config import RunnerConfig
from ramet.model_runner.memory import PoolTooLarge
from ramet.model_runner.parallel import TpGroup, connect, use_device
from ramet.model_runner.weights.errors import WeightsError
from ramet.scheduler.config import TpConfig

# What keeps a rank from being set up; the messages are for the user.
SETUP_ERRORS = (WeightsError, PoolTooLarge, ValueError, ChannelError, PeerLost, dist.DistError)
_TAIL_BYTES = 64 * 1024
_RETRY_S = 1.0
# An address where nothing answers is known to be so after this time at the latest.
_PROBE_S = 3.0


class Ranks(NamedTuple):
    """The other ranks, from rank 0. `send`: a plan for them to execute too, or a sign of life; raises PeerLost."""

    send: Callable[[StepPlan | Ping], None]
    group: TpGroup


def lead(config: TpConfig, runner: RunnerConfig, progress: Callable[[str], None]) -> Ranks:
    """Wait for all other ranks, and open the collectives. Raises one of SETUP_ERRORS."""
    use_device(runner)
    server = RankServer[Hello](config.address, config.secret, Hello)
    facts = rank_facts(runner)
    peers: dict[int, bytes] = {}
    deadline = time.monotonic() + config.meet_timeout_s
    while missing := sorted(set(range(1, config.size)) - peers.keys()):
        names = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        progress(f"waiting at {config.address} for {names}")
        if (came := server.receive(deadline)) is None:
            _refuse(
                server,
                peers.values(),
                f"{names} did not come to rank 0 at {config.address} within {config.meet_timeout_s:g} s "
                "(--dist-timeout): is every machine started, with the same address and secret?",
            )
        peer, hello = came
        # Another machine may have been started again meanwhile.
        peers = {rank: known for rank, known in peers.items() if _is_there(server, known)}
        if refusal := _refusal(hello, facts, set(range(1, config.size)) - peers.keys()):
            _refuse(server, [*peers.values(), peer], refusal)
        if _is_there(server, peer):  # which also tells it that rank 0 is
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
    return Ranks(functools.partial(server.send, list(peers.values())), _open(config, runner, store))


def join(config: TpConfig, runner: RunnerConfig, progress: Callable[[str], None]) -> tuple[RankClient[ToRank], TpGroup]:
    """Connect to rank 0, who may not be there yet, and open the collectives. Raises one of SETUP_ERRORS."""
    use_device(runner)
    facts = rank_facts(runner)
    deadline = time.monotonic() + config.meet_timeout_s
    progress(f"waiting for rank 0 at {config.address}{_trouble(config)}")
    while True:
        link = RankClient[ToRank](config.address, config.secret, ToRank)
        link.send(Hello(config.rank, facts))
        try:
            answer = link.receive(deadline - time.monotonic())
            while isinstance(answer, Ping):  # rank 0 waits for others, and knows how long
                answer = link.receive()
            break
        except PeerLost:  # one that was about to end: another takes its place
            link.close()
            time.sleep(_RETRY_S)
    if not isinstance(answer, Welcome):
        link.close()
        words = f"rank 0 did not answer at {config.address} within {config.meet_timeout_s:g} s (--dist-timeout)"
        raise ValueError(answer.message if isinstance(answer, Refused) else words + _trouble(config))
    if config.host:
        host, _, port = answer.store.rpartition(":")
        patience = datetime.timedelta(seconds=config.meet_timeout_s)
        return link, _open(config, runner, dist.TCPStore(host, int(port), config.size, timeout=patience))
    return link, _open(config, runner, dist.FileStore(answer.store, config.size))


def _trouble(config: TpConfig) -> str:
    """Why rank 0 on another machine cannot be reached at this moment, in words to append; nothing if it can."""
    if not config.host:
        return ""
    try:
        port = int(config.address.rpartition(":")[2])
        socket.create_connection((config.host, port), _PROBE_S).close()
    except OSError as error:
        return f": {error.strerror or error}"
    return ""


def _refuse(server: RankServer[Hello], peers: Iterable[bytes], words: str) -> NoReturn:
    """End the start of all that have come. Raises ValueError."""
    for peer in peers:
        with contextlib.suppress(PeerLost):
            server.send([peer], Refused(words))
    server.close()
    raise ValueError(words)


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
        # The same code of the kernels, so that the ranks choose the same tokens from the same logits.
        "compute capability": str(torch.cuda.get_device_capability()) if runner.device == "cuda" else "none",
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
