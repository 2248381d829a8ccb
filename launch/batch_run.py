"""`ramet batch run`: the lines of a file through an engine that serves nobody else, resumable.

It makes a store beside the output (`.OUTPUT.ramet`), puts the batch there as the API would, and starts the usual
processes on it: the frontend finds an unfinished batch and goes on with it. This process only shows how far it is, and
moves the results out of the store at the end. Lines that failed are in `OUTPUT.errors`.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from ramet.frontend.batch_input import MAX_ERRORS, InputCheck
from ramet.frontend.batch_store import Batches, read_batch
from ramet.frontend.schemas.batches import COMPLETION_WINDOW, ENDPOINTS, Batch, BatchRequest
from ramet.frontend.store import ENDED, Store, Upload
from ramet.launch.config import EngineConfig
from ramet.launch.roles import engine_processes
from ramet.launch.serve import INTERRUPTED, configure, reporting_errors, run
from ramet.launch.server_args import ConfigError, ServerArgs
from ramet.launch.supervisor import Supervisor

logger = logging.getLogger(__name__)

_POLL_S = 0.3
_CHECKED_LINES = 10_000
_FOR_EVER_S = 10 * 365 * 24 * 3600


def run_batch(args: ServerArgs, source: Path, output: Path) -> int:
    """The exit code: 0 when all lines have a result, 1 for a failure, 130 when it was stopped before the end."""
    return reporting_errors(args, lambda: _run(args, source, output))


def _run(args: ServerArgs, source: Path, output: Path) -> int:
    if not source.is_file():  # now, for a model may take long to fetch
        raise ConfigError(f"input {source} is not there, or not a file")
    if not output.name or not os.access(output.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"output {output} cannot be written: its folder is not there, or not writable")
    folder = output.with_name(f".{output.name}.ramet")
    is_new = not folder.exists()
    if is_new and output.exists():
        raise ConfigError(f"{output} exists already: remove it, or give another --output")
    config = _private(configure(args), folder)
    if is_new:
        _check(source, config)
    batch = _find_or_create(folder, source, config)
    if batch.status not in ENDED:
        supervisor = Supervisor(args)
        stopped = threading.Event()
        watching = threading.Thread(target=_watch, args=(folder, batch.id, stopped, supervisor.request_stop))
        try:
            run(supervisor, engine_processes(config, supervisor.addresses), watching.start)
        finally:
            stopped.set()
            if watching.is_alive():
                watching.join()
    return _collect(folder, batch.id, output)


def _private(config: EngineConfig, folder: Path) -> EngineConfig:
    """Nobody else can use this engine, and a file may be as long as one likes."""
    frontend = msgspec.structs.replace(
        config.frontend,
        host="127.0.0.1",
        port=0,
        api_keys=(secrets.token_hex(),),
        file_storage_path=str(folder),
        max_batch_lines=sys.maxsize,
    )
    return msgspec.structs.replace(config, frontend=frontend)


def _find_or_create(folder: Path, source: Path, config: EngineConfig) -> Batch:
    """The batch of this output. Raises ConfigError if it was begun with another input or model."""
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.closing(Store(str(folder))) as store:
        store.open()
        batches = Batches(store)
        for batch in batches.page(None, 1):
            if batch.metadata != {"sha256": digest}:
                raise ConfigError(f"{source} is not the input that {folder} was begun with: remove the folder")
            if batch.model not in (None, config.frontend.model_path, *config.frontend.served_names):
                raise ConfigError(f"{folder} was begun with the model {batch.model!r}: give it, or remove the folder")
            counts = batch.request_counts
            logger.info("going on after %d of %d lines", counts.done, counts.total)
            return batch
        upload = Upload(store)
        with source.open("rb") as file:
            shutil.copyfileobj(file, upload)
        stored = store.add(upload, source.name, "batch", None)
        request = BatchRequest(
            input_file_id=stored.id,
            endpoint=_endpoint(source),
            completion_window=COMPLETION_WINDOW,
            metadata={"sha256": digest},
        )
        return batches.create(request, _FOR_EVER_S)


def _check(source: Path, config: EngineConfig) -> None:
    """As the frontend will, but before an engine is started for it. Raises ConfigError that names the bad lines."""
    with contextlib.closing(InputCheck(source, _endpoint(source), config.frontend)) as check:
        while not check.step(_CHECKED_LINES):
            pass
    if check.errors:
        head = f"{source} cannot be run; its errors, at most {MAX_ERRORS} of them:"
        raise ConfigError("\n".join([head, *map(_words, check.errors)]))


def _words(error: dict[str, Any]) -> str:
    return f"line {error['line']}: {error['message']}" if error["line"] else error["message"]


class _Target(msgspec.Struct):
    url: str


def _endpoint(source: Path) -> str:
    """That of the first line; if it cannot be read, the check of the batch will say so."""
    with source.open("rb") as file, contextlib.suppress(msgspec.MsgspecError, StopIteration):
        first = next((line for line in file if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")
        url = msgspec.json.decode(first, type=_Target).url
        return next(endpoint for endpoint in ENDPOINTS if url in (endpoint, endpoint.removeprefix("/v1")))
    return ENDPOINTS[0]


def _watch(folder: Path, batch_id: str, stopped: threading.Event, on_end: Callable[[], None]) -> None:
    """Show the progress until the batch has ended, which calls `on_end`, or the engine has stopped."""
    with tqdm(unit=" lines", dynamic_ncols=True) as bar:
        while not stopped.wait(_POLL_S):
            batch = read_batch(folder, batch_id)
            counts = batch.request_counts
            if bar.total != counts.total:
                bar.reset(counts.total)
                bar.initial = counts.done
            bar.n = counts.done
            bar.set_postfix(failed=counts.failed)
            if batch.status in ENDED:
                on_end()
                return


def _collect(folder: Path, batch_id: str, output: Path) -> int:
    with contextlib.closing(Store(str(folder))) as store:
        store.open()
        batch = Batches(store).get(batch_id)
        counts = batch.request_counts
        if batch.status not in ENDED:
            sys.stderr.write(
                f"stopped after {counts.done} of {counts.total} lines; the same command goes on from there\n"
            )
            return INTERRUPTED
        errors = output.with_name(f"{output.name}.errors")
        for file_id, target in ((batch.output_file_id, output), (batch.error_file_id, errors)):
            # One that is not there was moved before this process was killed.
            if file_id is not None and store.content(file_id).exists():
                store.content(file_id).rename(target)
    shutil.rmtree(folder)
    if batch.status != "completed":
        words = map(_words, (batch.errors or {}).get("data", ()))
        sys.stderr.write("\n".join([f"error: the batch {batch.status}", *words, ""]))
        return 1
    if counts.completed == 0:
        output.touch()
    sys.stderr.write(f"completed lines: {counts.completed}, in {output}\n")
    if counts.failed:
        sys.stderr.write(f"failed lines: {counts.failed}, in {errors}\n")
    return 0
