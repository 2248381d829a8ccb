"""The tensor-parallel part of the configuration: which ranks run here, and how machines find and trust each other.

Reads the secret, which only the ranks' processes are told.
"""

import os
import re
import socket
from pathlib import Path

from ramet.frontend.port import bind
from ramet.launch.model_info import ModelInfo
from ramet.launch.server_args import ConfigError, ServerArgs
from ramet.scheduler.config import TpConfig

_SECRET_VARIABLE = "RAMET_DIST_SECRET"
_SECRET_CHARACTERS = 16


def tensor_parallel(args: ServerArgs, info: ModelInfo, device: str, is_embedding: bool) -> TpConfig:
    """That of the first rank on this machine. Raises ConfigError for what cannot be honoured."""
    # Ranks would find the same, with all else that has to be divided, but only when they have been started.
    heads, kv_heads = info.num_heads or 0, info.num_kv_heads or 0
    if heads % args.tp_size or (kv_heads % args.tp_size and args.tp_size % kv_heads):
        raise ConfigError(
            f"tp_size is {args.tp_size}, but the model has {heads} query and {kv_heads or heads} key-value heads: "
            "the former must be a multiple of it, the latter a multiple or a divisor"
        )
    if args.tp_size > 1 and is_embedding:
        raise ConfigError(f"tp_size is {args.tp_size}, but models that embed run on one device")
    if args.base_gpu_id and device == "cpu":
        raise ConfigError(f"base_gpu_id is {args.base_gpu_id}, but the model runs on a CPU")
    host = address = secret = ""
    if args.nnodes > 1:
        host, port = _numeric(args.dist_init_addr)
        address = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        secret = _secret(args.dist_secret_file)
    return TpConfig(
        rank=args.node_rank * (args.tp_size // args.nnodes),
        size=args.tp_size,
        address=address,
        host=host,
        secret=secret,
        meet_timeout_s=args.dist_timeout,
        setup_timeout_s=args.start_timeout,
    )


def check_meeting_point(args: ServerArgs) -> None:
    """What can be known of `--dist-init-addr` before a model is fetched. Raises ConfigError."""
    if args.nnodes == 1:
        return
    host, port = _numeric(args.dist_init_addr)
    try:
        if args.node_rank == 0:
            bind(host, port).close()
        else:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing, but fails if there is no way to go
    except OSError as error:
        doing = "listen on" if args.node_rank == 0 else "reach"
        raise ConfigError(
            f"dist_init_addr {args.dist_init_addr!r}: machine {args.node_rank} cannot {doing} it: {error.strerror}"
        ) from error


def _numeric(given: str | None) -> tuple[str, int]:
    """The numeric address, which ZeroMQ wants to listen on, and the port of HOST:PORT."""
    found = re.fullmatch(r"\[?(.+?)\]?:(\d{1,5})", given or "")
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"dist_init_addr must be HOST:PORT of machine 0, the same on all machines, got {given}")
    try:
        return str(socket.getaddrinfo(found[1], None, type=socket.SOCK_STREAM)[0][4][0]), int(found[2])
    except OSError as error:
        raise ConfigError(f"dist_init_addr {given!r}: {error}") from error


def _secret(path: str | None) -> str:
    try:
        secret = Path(os.path.expanduser(path)).read_text().strip() if path else os.environ.get(_SECRET_VARIABLE, "")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"dist_secret_file {path!r} cannot be read: {error}") from error
    if len(secret) < _SECRET_CHARACTERS:
        raise ConfigError(
            f"several machines need a secret in common, in dist_secret_file or {_SECRET_VARIABLE}, of at least "
            f"{_SECRET_CHARACTERS} characters, got {len(secret)}; `openssl rand -hex 32` makes one"
        )
    return secret
