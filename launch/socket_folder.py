"""The private folder of an engine's sockets, and the removal of those that killed launchers left behind.

A launcher holds a lock in its folder as long as it lives. The kernel drops it when the launcher dies, in whatever way,
so a folder whose lock can be had is nobody's. Folders of other users, and those without a lock, are left alone.
"""

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

# A short name: the path of a Unix socket is limited to 107 bytes.
_PREFIX = "ramet-"
_LOCK = "lock"


def make_folder() -> tuple[str, int]:
    """A new folder of mode 0700, and the descriptor of its lock, to be kept open. Removes stale ones."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        _remove_if_stale(folder)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    new = folder / "new"
    descriptor = os.open(new, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    new.rename(folder / _LOCK)  # only now: a lock that is not held is a stale one
    return str(folder), descriptor


def _remove_if_stale(folder: Path) -> None:
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return
        with (folder / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            logger.info("removed %s, which a killed launcher left behind", folder)
    except (FileNotFoundError, BlockingIOError):
        return  # no launcher's, or another one was faster; or its launcher lives
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)
