"""Compiles ``run_package.cpp`` with libtorch, which is in torch's wheel, and compares what it gives."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import torch
from torch import nn

import quantpatch as qp

TORCH = Path(torch.__file__).parent
SOURCE = Path(__file__).with_name("run_package.cpp")


def compiled(folder: Path) -> Path:
    """The program that runs a package."""
    program = folder / "run_package"
    includes = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
    libraries = [f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-std=c++20", *includes, str(SOURCE), "-o", str(program), *libraries], check=True)
    return program


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    with qp.quantize_modules():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    qp.prepare(model, x, runtime="inductor")
    qp.calibrate(model, [x], progress=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package, given, result = (folder / file for file in ("model.pt2", "x.pt", "y.pt"))
        lowered = qp.lower(model, x, path=package, latency=False)
        torch.save(x, given)
        subprocess.run([str(each) for each in (compiled(folder), package, given, result)], check=True)
        same = torch.equal(torch.load(result, weights_only=True), lowered(x))
    print(f"{len(lowered.report.integers)} layers on integers; C++ gives the same bits: {same}")


if __name__ == "__main__":
    main()
