"""Virtual environments for tests of what is installed: nothing is downloaded, and this one is not touched."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


class Environment:
    """A virtual environment that sees the packages of the running one, and has its own besides."""

    def __init__(self, folder: Path) -> None:
        venv.EnvBuilder(with_pip=False).create(folder)
        self.folder = folder
        self.python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
        purelib = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        # As site directories, so that the editable installations in there are found too.
        seen = [
            path for path in (*site.getsitepackages(), sysconfig.get_path("purelib")) if Path(path).exists()
        ]
        lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(seen)]
        (Path(purelib) / "seen.pth").write_text("\n".join(lines) + "\n")

    def run(self, *args: str) -> str:
        own = {
            key: value for key, value in os.environ.items() if not key.startswith(("QUANTPATCH_", "PYTEST"))
        }
        done = subprocess.run(  # in its own folder: no checkout is imported because it lies around
            [self.python, *args], cwd=self.folder, env=own, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *args: str) -> None:
        options = ("--python", self.python, "--disable-pip-version-check", "-q")
        done = subprocess.run(
            [sys.executable, "-m", "pip", *options, *args], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
