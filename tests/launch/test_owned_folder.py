"""What a killed process left is removed, and nothing else."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ramet.launch.owned_folder import make_folder

KILLED = """
import os, signal
from ramet.launch.owned_folder import make_folder
print(make_folder("ramet-")[0], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_only_stale_folders_are_removed(temporary: Path) -> None:
    living, locks = make_folder("ramet-")
    stale = subprocess.run(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, check=False
    ).stdout.strip()
    (Path(stale) / "scheduler").touch()
    foreign = temporary / "ramet-notes"
    foreign.mkdir()
    (temporary / "ramet-file").touch()
    (temporary / "ramet-link").symlink_to(stale)
    folder, second = make_folder("ramet-")
    assert not Path(stale).exists()
    left = {"ramet-notes", "ramet-file", "ramet-link", living.name, folder.name}
    assert {path.name for path in temporary.iterdir()} == left
    locks.close()
    second.close()


def test_systemd_tmpfiles_leaves_it_alone_as_long_as_it_is_in_use(temporary: Path) -> None:
    """It tries for this lock, and passes over a folder whose lock it cannot have, with all that is in it."""
    folder, locks = make_folder("ramet-")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locks.close()
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
