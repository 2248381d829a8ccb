"""What a killed process left is removed, and nothing else."""

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
    living, lock = make_folder("ramet-")
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
    for descriptor in (lock, second):
        os.close(descriptor)
