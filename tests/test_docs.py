"""The pages for readers name only files and flags that exist, and the two commands of the README stand."""

import re
from pathlib import Path

import pytest

from ramet.launch.cli import main

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/api.md", "docs/architecture.md", "docs/batches.md"]
PAGES += ["docs/benchmarking.md", "docs/clients.md", "docs/experiments.md", "docs/metrics.md", "docs/performance.md"]
PAGES += ["docs/security.md", "docs/tensor_parallel.md"]
# A path of the repository in backticks: with a folder, and a folder itself or a file of these kinds.
PATH = re.compile(r"`((?:[\w.-]+/)+(?:[\w-]+\.(?:py|md|toml))?|\.ci/run|[A-Z]+(?:\.md)?|pyproject\.toml)`")
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# Other programs have flags of their own.
OTHER_PROGRAMS = re.compile(
    r"pip install [^`\n]*|pytest [^`\n]*|python (?:-m )?(?:benchmarks|examples)\b[^`\n]*|lm_eval [^`]*"
)


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    missing = {path for path in PATH.findall(text) if not (ROOT / path).exists()}
    missing |= {link for link in LINK.findall(text) if not (ROOT / page).parent.joinpath(link).exists()}
    assert sorted(missing) == []


def test_each_promise_of_security_has_its_test() -> None:
    """A bullet of the page names the tests that hold it."""
    text = (ROOT / "docs/security.md").read_text()
    promises = text.partition("## What is promised")[2].partition("## What is not promised")[0]
    bullets = re.split(r"^- ", promises, flags=re.MULTILINE)[1:]
    assert len(bullets) > 10
    for bullet in bullets:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", bullet)
        assert tests, bullet
        for path, name in tests:
            assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


def test_paths_are_found_in_the_text() -> None:
    """Or the test above would pass for any text."""
    paths = set(PATH.findall((ROOT / "docs/architecture.md").read_text()))
    assert {"scheduler/core.py", "model_runner/models/", "pyproject.toml"} <= paths
    assert "examples/chat.py" in LINK.findall((ROOT / "README.md").read_text())


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["serve"], ["bench", "serve"], ["bench", "offline"], ["bench", "step"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
    known = set(FLAG.findall(capsys.readouterr().out))
    assert "--model-path" in known
    flags = set(FLAG.findall(OTHER_PROGRAMS.sub("", (ROOT / page).read_text())))
    assert sorted(flags - known) == []


def test_the_readme_has_its_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "pip install . && launch_server" in lines
    assert "pip install '.[test]' && pytest -n 2" in lines
    assert "pip install --quiet '.[test]' && pytest -n 2" in (ROOT / ".ci/run").read_text().splitlines()


def test_the_architecture_names_every_module_folder() -> None:
    """A new folder of the package needs its row in the table of layers."""
    text = (ROOT / "docs/architecture.md").read_text()
    folders = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    assert "scheduler" in folders
    assert [folder for folder in folders if f"| `{folder}/` |" not in text] == []
