"""What is done to each model, and what came of it.

Weights are random, and so are the statistics of batch norms, so that a wrong fold shows. Of each model:

- what is built in a block with ``operations="products"`` takes the float twin's ``state_dict`` strictly,
- it computes in float what the float twin computes, to the bit, also after pickling (where the float twin can
  be pickled), and again once reverted,
- prepared for ONNX Runtime it computes in float what the float twin computes,
- it is calibrated without an error, and its output compared with the float twin's,
- it is exported, and the file's output in ONNX Runtime compared with the model's.

The shares are those of multiplications on quantized operands: as they come out of a block without operations,
with them, and converted with them.

Any exception, and a difference of more than 1e-5 in float, is a failure; what cannot be exported is counted.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.errors import ExportError
from quantpatch.layers.quantizer import in_float

# What float models may differ by, relative to the size of the output, since folding rounds once more. Where a
# model with random weights makes more of a rounding, it is compared in float64.
EXACT = 1e-5


@attrs.frozen
class Subject:
    """A float model, how to build another, and what to run it on."""

    twin: nn.Module
    build: Callable[[], nn.Module]
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = attrs.field(factory=dict)

    def run(self, model: nn.Module) -> Tensor:
        """The first tensor of its output."""
        with torch.no_grad():
            return _tensor(model(*self.args, **self.kwargs))

    def double(self) -> Subject:
        """The same in float64."""
        args = tuple(x.double() if x.is_floating_point() else x for x in self.args)
        return attrs.evolve(self, twin=self.twin.double(), args=args)

    def built(self, operations: Any = "products") -> nn.Module:
        """The model, built in a block, with the weights of its float twin."""
        with qp.quantize_modules(operations=operations):
            quantized = self.build().eval()
        quantized.to(next(self.twin.parameters()).dtype)
        quantized.load_state_dict(self.twin.state_dict(), strict=True)
        return quantized

    def share(self, model: nn.Module) -> float:
        """The share of its multiplications that are on quantized operands."""
        return qp.audit(model, self.args, kwargs=self.kwargs).share


@attrs.define
class Row:
    """What came of a model."""

    collection: str
    family: str
    model: str = ""
    share: float | None = None
    with_operations: float | None = None
    converted: float | None = None
    exact: float | None = None
    rounded: float | None = None
    error: float | None = None
    file: float | None = None
    integers: str = ""
    skipped: tuple[str, ...] = ()
    float_products: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unbuilt: str = ""
    unexported: str = ""
    failure: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether something did not work."""
        return not self.unbuilt and (bool(self.failure) or self.exact is None or not self.exact <= EXACT)


@contextmanager
def torchvision_of_any_torch() -> Iterator[None]:
    """Inside of it torchvision can be imported, though it be built for another torch than that which is here.

    What it registers with torch about operators in its binary part needs that to be loaded.
    """
    register = torch.library.register_fake

    def if_it_exists(operator: Any, function: Any = None, /, **options: Any) -> Any:
        def registered(function: Any) -> Any:
            try:
                return register(operator, function, **options)
            except RuntimeError:
                return function

        return registered if function is None else registered(function)

    with mock.patch.object(torch.library, "register_fake", if_it_exists):
        yield


def lively(model: nn.Module) -> nn.Module:
    """A model whose batch norms and zeros are not those of a new one."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.normal_(module.bias, 0, 0.3)
    for parameter in model.parameters():
        if (parameter.dim() > 1 or parameter.numel() == 1) and not parameter.any():
            nn.init.normal_(parameter, 0, 0.1)  # branches that begin as nothing give nothing to calibrate on
    return model.eval()


class Unbuilt(Exception):
    """A float model that cannot be built or run here."""


def measure(row: Row, subject: Callable[[Row], Subject], *, export: bool) -> Row:
    """Does all that to a model; fills its row."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", qp.QuantPatchWarning)
            _measure(row, subject(row), export=export)
        row.notes = tuple(str(w.message) for w in caught if issubclass(w.category, qp.QuantPatchWarning))
    except Unbuilt as error:
        row.unbuilt = str(error)
    except Exception as error:
        row.failure = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    row.seconds = time.perf_counter() - start
    return row


def _measure(row: Row, subject: Subject, *, export: bool) -> None:
    expected = subject.run(subject.twin)
    row.share = subject.share(subject.built(operations=()))
    converted = copy.deepcopy(subject.twin)
    qp.convert(converted, operations="products")
    row.converted = subject.share(converted)
    del converted
    quantized = subject.built()
    audit = qp.audit(quantized, subject.args, kwargs=subject.kwargs)
    row.with_operations = audit.share
    row.float_products = tuple(
        f"{product.module} {product.operation} {product.macs / max(audit.macs, 1):.2%}: {product.reason}"
        for product in audit.rows
        if product.why is not None and not product.of_weight
    )
    copies = [copy.deepcopy(quantized)]
    if _is_pickled(subject.twin):
        copies.append(pickle.loads(pickle.dumps(quantized)))
    for twin in copies:
        with in_float(twin):
            if not torch.equal(subject.run(twin), expected):
                raise AssertionError("with quantizers off it does not compute what the float model does")
    qp.revert(twin)
    if not torch.equal(subject.run(twin), expected):
        raise AssertionError("reverted it is not the float model")
    del twin, copies
    row.skipped = _prepared(subject, quantized)
    with in_float(quantized):
        row.exact = _off(subject.run(quantized), expected)
    report = qp.calibrate(quantized, [subject.kwargs or subject.args], progress=False, strict=False)
    zeros = [name for name, why in report.skipped.items() if why == "saw only zeros"]
    qp.configure(quantized, dict.fromkeys(zeros))  # as calibrate says, such as a first state
    row.error = _off(subject.run(quantized), expected)
    if export:
        try:
            _export(row, subject, quantized)
        except ExportError as error:
            row.unexported = str(error)
    if row.exact > EXACT:
        del quantized
        row.rounded, row.exact = row.exact, _exact(subject.double())


def _is_pickled(model: nn.Module) -> bool:
    """Whether a float model that has run can be pickled: not with parametrizations, or local functions."""
    try:
        pickle.dumps(model)
    except Exception:
        return False
    return True


def _prepared(subject: Subject, quantized: nn.Module) -> tuple[str, ...]:
    report = qp.prepare(quantized, subject.args, kwargs=subject.kwargs, runtime="onnxruntime")
    return tuple(f"{name}: {why}" for name, why in {**report.batchnorm.skipped, **report.skipped}.items())


def _exact(subject: Subject) -> float:
    """How far off a prepared model is in float64."""
    quantized = subject.built()
    _prepared(subject, quantized)
    with in_float(quantized):
        return _off(subject.run(quantized), subject.run(subject.twin))


def _export(row: Row, subject: Subject, quantized: nn.Module) -> None:
    """Writes a file and runs it."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        report = qp.export_onnx(
            quantized, subject.args, path, kwargs=subject.kwargs, latency=False, progress=False
        )
        found = report.comparison
        assert found is not None
        row.integers = found.not_run or f"{found.mismatching} of {found.integers:,}"
        session = onnxruntime.InferenceSession(path)
        given = [x.numpy() for x in (*subject.args, *subject.kwargs.values())]
        names = [value.name for value in session.get_inputs()]
        output = session.run(None, dict(zip(names, given, strict=True)))[0]
    row.file = _off(torch.from_numpy(output), subject.run(quantized))


def _tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def _off(now: Tensor, before: Tensor) -> float:
    return float((now - before).double().norm() / before.double().norm())
