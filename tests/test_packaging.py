"""The package list of pyproject.toml, which setuptools cannot find out because the folders stand at the root."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_PACKAGED = {"tests", "docs", "benchmarks", "examples", "build", "dist"}


def test_every_package_folder_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"ramet"}
    for module in ROOT.rglob("*.py"):
        parts = module.relative_to(ROOT).parent.parts
        if parts and parts[0] not in NOT_PACKAGED and not parts[0].startswith("."):
            found.add(".".join(("ramet", *parts)))
    assert sorted(listed) == sorted(found)


def test_every_package_folder_has_an_init() -> None:
    """Without it a folder becomes a namespace package, which wheels and mypy treat differently."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    missing = [name for name in listed if not (ROOT.joinpath(*name.split(".")[1:]) / "__init__.py").exists()]
    assert missing == []
