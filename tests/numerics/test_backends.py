"""One place selects the backend, and each has the same functions."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quantpatch.numerics.backends import Backend, eager, inductor, numba, select, triton
from quantpatch.numerics.backends.clip_mask import ClipMask
from quantpatch.numerics.formats import BUILTIN_FORMATS, Blocked, Integer
from quantpatch.numerics.modes import is_plain_gradient
from quantpatch.numerics.qparams import QParams

HAS_NUMBA = importlib.util.find_spec("numba") is not None
ON_CPU = [eager, inductor, *([numba] if HAS_NUMBA else [])]
X = torch.randn(24, 8, 40, generator=torch.Generator().manual_seed(0)).contiguous()


class Down(Integer):
    """Rounds as it likes."""


def test_each_has_the_functions_of_the_interface() -> None:
    wanted = [name for name in vars(Backend) if not name.startswith("_")]
    assert len(wanted) == 6
    for backend in (eager, inductor, numba, triton):
        assert all(callable(getattr(backend, name)) for name in wanted)


@pytest.mark.parametrize("kernels", [True], ids=["kernels"], indirect=True)
def test_in_main_memory_kernels_serve_what_they_can_and_eager_the_rest(
    kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, int8 = torch.tensor(1.0), Integer(8)
    assert select(X, QParams(int8, one)) is numba
    assert select(X) is numba
    for other, q in (
        (X.half(), QParams(int8, one)),
        (X[:, ::2], QParams(int8, one)),
        (X, QParams(Down(8), one)),
        (X, QParams(Blocked(Down(8), 4), one)),
        (X, QParams(int8, torch.ones((), device="meta"))),
    ):
        assert select(other, q) is eager
    monkeypatch.setattr(numba, "_SMALLEST", X.numel() + 1)
    assert select(X, QParams(int8, one)) is eager


def test_what_cannot_be_read_is_computed_in_plain_operations() -> None:
    q = QParams(Integer(8), torch.tensor(1.0))
    assert select(X.to("meta"), q) is inductor
    with FakeTensorMode() as mode:
        assert select(mode.from_tensor(X), q) is inductor
    chosen = []
    torch.vmap(lambda x: chosen.append(select(x, q)) or x)(X)
    torch.compile(lambda x: chosen.append(select(x, q)) or x, backend="eager", fullgraph=True)(X)
    assert chosen == [inductor, inductor]


def grids() -> dict[str, QParams]:
    rows = X.abs().amax((1, 2), keepdim=True) * 0.6
    blocks = torch.rand(24, 8, 2, generator=torch.Generator().manual_seed(1)) + 0.3
    return {
        "one range": QParams(Integer(8), torch.tensor(1.1)),
        "channels": QParams(Integer(4), rows, zero_point=3),
        "a negative one for 0": QParams(Integer(8, unsigned=True), torch.tensor(1.1), zero_point=200),
        "its own": QParams(Integer(8, unsigned=True), None, torch.tensor(0.02)),
        "blocks": QParams(Blocked(Integer(4), 20), blocks, blocks / 7, 2),
        "float": QParams(BUILTIN_FORMATS["fp8_e4m3"], torch.tensor(1.1)),
    }


@pytest.mark.parametrize("kernels", [True], ids=["kernels"], indirect=True)
@pytest.mark.parametrize("which", grids())
@pytest.mark.parametrize("backend", ON_CPU)
def test_each_gives_the_same_bits_and_a_mask_that_all_can_apply(
    kernels: bool, which: str, backend: Backend
) -> None:
    q = grids()[which]
    expected, mask = inductor.round_and_mask(X, q)
    found, own = backend.round_and_mask(X, q)
    assert torch.equal(found, expected)
    assert torch.equal(backend.round_trip(X, q), expected)
    grad = torch.linspace(-1, 1, X.numel()).view(X.shape)
    assert is_plain_gradient(grad) is not torch.is_grad_enabled()
    masked = inductor.zero_clipped(grad, mask, q)
    assert 0 < int((masked == 0).sum()) < X.numel()
    assert torch.equal(backend.zero_clipped(grad, own, q), masked)
    assert torch.equal(inductor.zero_clipped(grad, own, q), masked)


@pytest.mark.parametrize("kernels", [True], ids=["kernels"], indirect=True)
@pytest.mark.parametrize("backend", ON_CPU)
def test_each_finds_the_same_magnitudes(kernels: bool, backend: Backend) -> None:
    def same(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and torch.equal(a, b)

    assert same(backend.amax(X, ()), X.abs().amax())
    assert same(backend.amax(X, (24, 1, 1)), X.abs().amax((1, 2), keepdim=True))
    blocks = torch.stack([X[..., :32].abs().amax(-1), X[..., 32:].abs().amax(-1)], -1)
    assert same(backend.amax(X, (24, 8, 2), 2, 32), blocks)


def test_nothing_is_kept_where_nothing_is_clipped() -> None:
    assert eager.round_and_mask(X, QParams(Integer(8), torch.tensor(9.0)))[1] == ClipMask()
