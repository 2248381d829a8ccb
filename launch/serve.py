"""The life of a server: find the model, settle the configuration, start the processes, wait, stop.

Returns the exit code. Nothing a user can cause ends in a traceback.
"""

import contextlib
import logging
import signal
import sys
from collections.abc import Callable

from ramet.frontend.port import bind
from ramet.frontend.store import Store
from ramet.ipc.errors import RequestError
from ramet.launch.cache import ModelUnavailable
from ramet.launch.child import Process
from ramet.launch.config import EngineConfig, default_storage, resolve, tls
from ramet.launch.hardware import why_no_cuda
from ramet.launch.logs import set_up_logging
from ramet.launch.model_source import resolve_model
from ramet.launch.roles import engine_processes
from ramet.launch.server_args import ConfigError, ServerArgs
from ramet.launch.supervisor import EngineFailed, StopRequested, Supervisor
from ramet.launch.tensor_parallel import check_meeting_point

logger = logging.getLogger(__name__)

INTERRUPTED = 130


def serve(args: ServerArgs) -> int:
    def start() -> int:
        if args.node_rank == 0:
            check_port(args.host, args.port)
            tls(args)  # a bad file is known before the model is fetched
            with contextlib.closing(Store(args.file_storage_path or default_storage(args.port))) as store:
                if args.file_storage_path is not None or store.exists:
                    store.open()  # as the frontend will; another server may have it
        check_meeting_point(args)
        config = configure(args)
        supervisor = Supervisor(args)
        run(supervisor, engine_processes(config, supervisor.addresses), lambda: print_ready(config))
        return 0

    return reporting_errors(args, start)


def reporting_errors(args: ServerArgs, action: Callable[[], int]) -> int:
    """The exit code of `action`, or that of what it raises, said in words."""
    set_up_logging("launcher", args.log_level, args.log_format)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # until there is something to drain
        return action()
    except (ModelUnavailable, ConfigError, EngineFailed, RequestError, OSError) as error:
        if args.log_format == "json":
            logger.error("%s", error)
        else:
            sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def configure(args: ServerArgs) -> EngineConfig:
    """Find the model and settle what was left open. Raises ModelUnavailable and ConfigError."""
    if args.device == "cuda" and (reason := why_no_cuda()) is not None:
        raise ConfigError(f"device is cuda, but {reason}; --device cpu needs none")
    return resolve(args, resolve_model(args))


def run(supervisor: Supervisor, processes: list[Process], on_ready: Callable[[], None]) -> None:
    """Start, and serve until SIGINT or SIGTERM. Raises EngineFailed; whatever happens, nothing is left running."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda _number, _frame: supervisor.request_stop())
        supervisor.start(processes)
        on_ready()
        supervisor.wait()
        logger.info("stopping when the running requests are done; a second signal stops at once")
    except StopRequested:
        logger.info("stopped before the engine was ready")
    finally:
        supervisor.stop()


def print_ready(config: EngineConfig) -> None:
    """Where the server listens, and a request to try."""
    if config.scheduler.tp.rank:  # another machine serves
        logger.info("the ranks are ready")
        return
    frontend = config.frontend
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(frontend.host, frontend.host)
    scheme = "http" if frontend.tls is None else "https"
    url = f"{scheme}://[{host}]:{frontend.port}" if ":" in host else f"{scheme}://{host}:{frontend.port}"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if frontend.api_keys else ""
    name = frontend.served_names[0]
    path, fields = "chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'
    if frontend.is_embedding:
        path, fields = "embeddings", '"input": "Hello!"'
    sys.stdout.write(
        f"\nServing {name} at {url}/v1 - try:\n\n"
        f"  curl {url}/v1/{path} -H 'Content-Type: application/json'{key} \\\n"
        f"""    -d '{{"model": "{name}", {fields}}}'\n\n"""
    )
    sys.stdout.flush()


def check_port(host: str, port: int) -> None:
    """Raises ConfigError if the address cannot be listened on: better now than after the weights are loaded."""
    try:
        bind(host, port).close()
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
