"""The releases that are asked for are those that the tests are run with by `make oldest`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOOR = re.compile(r'"([\w.-]+)>=([\d.]+)')


def oldest() -> dict[str, str]:
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


# That of transformers needs a newer Python than the oldest, and so is not among them.
TRIED = [
    ROOT / "pyproject.toml",
    *(
        file
        for file in ROOT.glob("plugins/*/pyproject.toml")
        if file.parent.name != "quantpatch-transformers"
    ),
]


@pytest.mark.parametrize("file", TRIED, ids=str)
def test_what_is_asked_for_is_what_is_tried(file: Path) -> None:
    found = oldest()
    for name, version in FLOOR.findall(file.read_text()):
        tried = found.get(name.lower().replace("_", "-"))
        if tried is not None:
            numbers = [int(part) for part in tried.split(".")]
            floor = [int(part) for part in version.split(".")]
            assert numbers[: len(floor)] == floor, f"{name}>={version}, and {tried} is tried"
            assert not any(numbers[len(floor) :]) or name in ("pyyaml",), (name, tried)


def test_the_pages_say_the_same_floor() -> None:
    major_minor = oldest()["torch"].rpartition(".")[0]
    for page in ("README.md", "docs/index.md"):
        assert f"PyTorch {major_minor} or newer" in (ROOT / page).read_text()
