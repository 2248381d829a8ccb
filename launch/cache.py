"""The folder in which fetched and prepared models are kept, how a folder gets into it whole or not at all, and the one
error of all that looks for models.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ramet.launch.owned_folder import LOCK, make_folder


class ModelUnavailable(Exception):
    """A model that cannot be had or used, or not in the form that was asked; the message says why and what to do."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/ramet/models`, by default below ~/.cache. Raises ModelUnavailable for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise ModelUnavailable("this user has no home folder to keep models in: set XDG_CACHE_HOME to a folder")
    return Path(base) / "ramet" / "models"


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and is removed when it does not.

    Two processes may do this at the same time: the rename is atomic, and the one that comes second keeps the first
    one's result. What killed ones left behind is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, locks = make_folder(".filling-", folder.parent)
    try:
        yield temporary
        (temporary / LOCK).unlink()
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        locks.close()
        shutil.rmtree(temporary, ignore_errors=True)
