"""Folders that are of use only as long as the process that made them lives: of an engine's sockets, of a download.

The process holds a lock in its folder. The kernel drops it when the process dies, in whatever way, so a folder whose
lock can be had is nobody's, and whoever makes the next one removes it. Folders of other users and those without a lock
are left alone. A second lock, on the folder itself, is for systemd-tmpfiles, which else removes what is ten days old in
/tmp; the first cannot be there, since over NFS only what may be written can be locked for others to see.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = "lock"


def make_folder(prefix: str, parent: Path | None = None) -> tuple[Path, contextlib.ExitStack]:
    """A new folder of mode 0700, by default among the temporary ones, and its locks, to be kept until they are closed.
    Removes stale ones."""
    parent = parent or Path(tempfile.gettempdir())
    for folder in parent.glob(f"{prefix}*"):
        _remove_if_stale(folder)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    new = folder / "new"
    locks = contextlib.ExitStack()
    for path, flags in ((new, os.O_CREAT | os.O_RDWR), (folder, os.O_RDONLY)):
        descriptor = os.open(path, flags, 0o600)
        locks.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    new.rename(folder / LOCK)  # only now: a lock that is not held is a stale one
    return folder, locks


def _remove_if_stale(folder: Path) -> None:
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return
        with (folder / LOCK).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            logger.info("removed %s, which a killed process left behind", folder)
    except (FileNotFoundError, BlockingIOError):
        return  # no such folder, or another process was faster; or its owner lives
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)
