"""The plugin's README: its Python runs, and prints what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_every_python_block_runs_and_prints_what_the_page_shows(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    blocks = re.findall(
        r"^```python\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", README.read_text(), re.M | re.S
    )
    assert blocks
    for code, shown in blocks:
        capsys.readouterr()
        exec(code, namespace)
        if shown:
            assert capsys.readouterr().out == shown
