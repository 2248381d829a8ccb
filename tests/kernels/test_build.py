"""How the C kernels are compiled and kept: without a compiler, without room, with several processes at once."""

import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

from ramet.kernels.cpu import huge_pages
from ramet.kernels.cpu.build import KernelUnavailable, load_kernel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kernels are kept; empty."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ramet" / "kernels"


def load_in_processes(count: int = 1) -> None:
    """At once. In processes of their own, for nothing unloads a library, and one that is loaded is not looked for."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=load_kernel, args=("sampling",)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * count


def test_a_kernel_is_compiled_once(cache: Path) -> None:
    load_in_processes()
    (made,) = cache.iterdir()
    at = made.stat().st_mtime_ns
    load_in_processes()
    assert [file.stat().st_mtime_ns for file in cache.iterdir()] == [at]


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"#!/bin/sh\n" * 100])
def test_a_broken_library_is_made_again(cache: Path, content: bytes) -> None:
    load_in_processes()
    (made,) = cache.iterdir()
    made.write_bytes(content)
    load_in_processes()
    assert [file.name for file in cache.iterdir()] == [made.name]
    assert made.stat().st_size > 4000


def test_where_it_cannot_be_kept_it_runs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert load_kernel("sampling").choose
    assert "sampling will be compiled at each start, for it cannot be kept: [Errno 20]" in caplog.text


def test_several_processes_at_once(cache: Path) -> None:
    load_in_processes(3)
    assert len(list(cache.iterdir())) == 1


def test_the_compiler_may_have_arguments(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -DNOTHING")
    assert load_kernel("sampling").choose
    monkeypatch.setenv("CC", "")
    assert load_kernel("sampling").choose


def test_a_compiler_that_is_missing_fails_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(KernelUnavailable, match=r"kernel sampling: .*no-such-compiler"):
        load_kernel("sampling")
    compiler = tmp_path / "cc"
    for script, words, timeout_s in (
        ("echo 'bad flags' >&2; exit 3", "status 3: bad flags", 60),
        ("exec sleep 60", "timed out", 1),
    ):
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        monkeypatch.setattr("ramet.kernels.cpu.build._COMPILE_TIMEOUT_S", timeout_s)
        with pytest.raises(KernelUnavailable, match=words):
            load_kernel("sampling")


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(KernelUnavailable, match="home directory"):
        load_kernel("sampling")


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmap.MADV_HUGEPAGE", 12345)  # the kernel refuses what it does not know
    assert huge_pages.zeros((3, 5), torch.float32).tolist() == [[0.0] * 5] * 3
