"""The kernels give the bits that torch's operations give, whatever lies where."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import assert_same_bits, both_ways, cases, strides
from torch import nn

import quantpatch as qp
from quantpatch.calibrators import EntropyCalibrator
from quantpatch.numerics.backends import numba
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS, Blocked, Integer
from quantpatch.numerics.kernels import buffers, threads
from quantpatch.numerics.ranges import reduce_amax

pytest.importorskip("numba")

pytestmark = pytest.mark.parametrize("kernels", [True], ids=["kernels"], indirect=True)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_results_ranges_and_gradients_have_the_bits_of_torchs_operations(data):
    x, number_format, axis, amax = data.draw(cases())
    amax = data.draw(st.sampled_from([amax, None]))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)

    def result_and_gradient():
        leaf = x.detach().requires_grad_()
        y = fake_quantize(leaf, amax, number_format, axis=axis)
        (gradient,) = torch.autograd.grad(y, leaf, grad)
        return y.detach(), gradient, fake_quantize(x, amax, number_format, axis=axis)

    ours, torchs = both_ways(result_and_gradient)
    for a, b in zip(ours, torchs, strict=True):
        assert_same_bits(a, b)
    assert strides(ours[0]) == strides(ours[2]) == strides(torchs[0])
    if not isinstance(number_format, Blocked):
        assert_same_bits(*both_ways(lambda: reduce_amax(x, axis=axis)))


@settings(max_examples=60, deadline=None)
@given(
    channels=st.sampled_from([1, 3]),
    length=st.sampled_from([1, 7, 2047, 2048, 2049, 9000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.0, 1e-40, 1.0, 1e30]),
    bins=st.sampled_from([8, 2048]),
)
def test_histograms_have_the_counts_of_torchs_operations(channels, length, dtype, scale, bins):
    x = (torch.randn(channels, length, generator=torch.Generator().manual_seed(length)) * scale).to(dtype)

    def counts():
        calibrator = EntropyCalibrator(Integer(8), None if channels == 1 else 0, num_bins=bins)
        calibrator.collect(x)
        calibrator.collect(x * 0.1)
        return calibrator.histogram()

    ours, torchs = both_ways(counts)
    assert torch.equal(ours[0], torchs[0])
    assert torch.equal(ours[1], torchs[1])
    assert int(ours[0].sum()) == 2 * x.numel()


@pytest.mark.parametrize("layout", ["tensor", "channel", "last axis", "blocks"])
def test_threads_give_the_bits_of_one(monkeypatch, layout):
    x = torch.randn(24, 16, 160)
    number_format = BUILTIN_FORMATS["int4_g32" if layout == "blocks" else "int8"]
    axis = {"tensor": None, "channel": 0, "last axis": -1, "blocks": -1}[layout]
    kept = {"tensor": None, "channel": 0, "last axis": 2, "blocks": (0, 1)}[layout]
    amax = 0.5 * reduce_amax(x, axis=kept)
    if layout == "blocks":
        amax = amax.expand(-1, -1, 5)
    used = []

    def everything():
        leaf = x.clone().requires_grad_()
        y = fake_quantize(leaf, amax, number_format, axis=axis)
        dynamic = fake_quantize(x, None, number_format, axis=axis)
        calibrator = EntropyCalibrator(number_format)
        calibrator.collect(x)
        return [y.detach(), torch.autograd.grad(y.sum(), leaf)[0], dynamic, calibrator.histogram()[0]]

    one = everything()
    monkeypatch.setattr(threads, "_SMALLEST", 4096)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    submit = threads._threads().submit
    monkeypatch.setattr(threads._threads(), "submit", lambda *a: used.append(a) or submit(*a))
    assert all(map(torch.equal, one, everything()))
    assert len(used) >= 8


def _quantize_in_child(queue):
    torch.set_num_threads(1)
    y = numba.for_parts(10, lambda start, n: n)
    threads._SMALLEST = 4096
    x = torch.ones(64, 1024)
    torch.get_num_threads = lambda: 2
    queue.put((y, float(fake_quantize(x, torch.tensor(1.0), Integer(8)).sum())))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_starts_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(threads, "_SMALLEST", 4096)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    fake_quantize(torch.ones(64, 1024), torch.tensor(1.0), Integer(8))
    assert threads._pool is not None
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_quantize_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == ([10], 64 * 1024)
    child.join(60)
    assert child.exitcode == 0


def test_what_lies_outside_is_kept_in_an_eighth_of_a_byte_an_element():
    x = torch.randn(64, 1000, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        fake_quantize(x, torch.tensor(2.0), Integer(8))
        assert saved == [8000]
        fake_quantize(x, torch.tensor(9.0), Integer(8))
    assert saved == [8000]


def test_gradients_of_gradients_and_batched_ones_pass_the_bits():
    x = torch.randn(9, 11).requires_grad_()
    y = fake_quantize(x, torch.tensor(1.0), Integer(8))
    inside = (x.detach().abs() <= 1).float()
    upstream = torch.randn(9, 11, requires_grad=True)
    (grad,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    assert torch.equal(grad, upstream * inside)
    assert torch.equal(torch.autograd.grad(grad.sum(), upstream)[0], inside)
    y = fake_quantize(x, torch.tensor(1.0), Integer(8))
    several = torch.randn(4, 9, 11)
    (grads,) = torch.autograd.grad(y, x, several, is_grads_batched=True)
    assert torch.equal(grads, several * inside)


def test_a_model_trains_to_the_same_weights_and_calibrates_to_the_same_ranges():
    def trained():
        torch.manual_seed(0)
        with qp.quantize_modules():
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        data = torch.randn(4, 16, 3, 8, 8)
        qp.calibrate(model, list(data), method="entropy", progress=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for x in data:
            optimizer.zero_grad()
            torch.utils.checkpoint.checkpoint(model, 3 * x, use_reentrant=False).square().mean().backward()
            optimizer.step()
        return list(model.state_dict().values())

    assert all(map(torch.equal, *both_ways(trained)))


def test_a_weights_result_has_the_memory_of_the_step_before_unless_it_is_still_in_use():
    weight = nn.Parameter(torch.randn(512, 1024))
    amax = torch.tensor(2.0)

    def step():
        return fake_quantize(weight, amax, Integer(8))

    first = step()
    address = first.data_ptr()
    second = step()
    assert second.data_ptr() != address  # the first is there still
    kept = second.detach()[3:]
    address, values = second.data_ptr(), kept.clone()
    del first, second
    with torch.no_grad():
        weight.mul_(0.5)
    third = step()
    assert third.data_ptr() != address
    assert torch.equal(kept, values)
    address = third.data_ptr()
    loss = (third * 3.0).sum()
    del third
    loss.backward()
    del loss
    again = step()
    assert again.data_ptr() == address
    assert_same_bits(again.detach(), fake_quantize(weight.detach(), amax, Integer(8)))
    again.sum().backward()


def test_the_memory_kept_for_a_weight_goes_with_it_and_with_evaluation():
    weight = nn.Parameter(torch.randn(512, 1024))
    fake_quantize(weight, torch.tensor(2.0), Integer(8))
    assert weight in buffers._of_parameter
    with torch.no_grad():
        fake_quantize(weight, torch.tensor(2.0), Integer(8))
    assert weight not in buffers._of_parameter
    fake_quantize(weight, torch.tensor(2.0), Integer(8))
    before = len(buffers._of_parameter)
    del weight
    assert len(buffers._of_parameter) == before - 1


def test_a_subclass_of_a_format_rounds_as_it_says():
    class Down(Integer):
        def round_(self, y):
            return y.floor_().clamp_(self.min, self.max)

    x = torch.tensor([0.9, -0.1, 5.5])
    assert fake_quantize(x, torch.tensor(127.0), Down()).tolist() == [0.0, -1.0, 5.0]


def test_small_tensors_do_not_load_the_kernels(monkeypatch):
    monkeypatch.setattr(numba, "_SMALLEST", 2**12)
    monkeypatch.setattr(numba, "_load", lambda dtype: pytest.fail("loaded"))
    fake_quantize(torch.randn(4095), None, Integer(8))
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        fake_quantize(torch.randn(4096), None, Integer(8))


def test_without_numba_operations_stand_in_silently(monkeypatch):
    numba._load.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(numba.importlib.util, "find_spec", lambda name: None)
    try:
        assert float(fake_quantize(torch.ones(8), torch.tensor(1.0), Integer(8)).sum()) == 8.0
        assert numba._load(torch.float32) is None
    finally:
        numba._load.cache_clear()


def test_kernels_that_do_not_work_are_reported_once(monkeypatch):
    from quantpatch.numerics.kernels import source

    def broken(name, dtype):
        raise RuntimeError("no LLVM here")

    numba._load.cache_clear()
    monkeypatch.setattr(source, "kernel", broken)
    try:
        with pytest.warns(RuntimeWarning, match="CPU kernels do not work here.*no LLVM here"):
            y = fake_quantize(torch.ones(8), torch.tensor(1.0), Integer(8))
        assert float(y.sum()) == 8.0
        fake_quantize(torch.ones(8), torch.tensor(1.0), Integer(8))  # warnings are errors here
    finally:
        numba._load.cache_clear()


def test_kernels_are_kept_by_a_version_that_changes_with_any_of_their_files(tmp_path, monkeypatch):
    from quantpatch.numerics.kernels.source import compilation

    copy = tmp_path / "source"
    shutil.copytree(Path(compilation.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compilation.resources, "files", lambda package: copy)
    assert compilation._version() == compilation._VERSION
    for function, *_ in compilation.KERNELS.values():
        assert function.__qualname__.endswith(compilation._VERSION)
    for file in copy.glob("*.py"):
        before = compilation._version()
        file.write_text(file.read_text() + "\n")
        assert compilation._version() != before


def test_kernels_that_can_be_kept_nowhere_work_all_the_same(monkeypatch):
    from numba.core.caching import CacheImpl

    from quantpatch.numerics.kernels import source

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    kernel = source.kernel.__wrapped__("amax", "float32")
    x, peaks = torch.tensor([1.0, -3.0]), torch.zeros(1, dtype=torch.int32)
    kernel(x.data_ptr(), 0, 2, peaks.data_ptr(), 1, 2, 2, 1)
    assert peaks.view(torch.float32).item() == 3.0
