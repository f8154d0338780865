"""Layers come out quantized: for the whole process, until ``deactivate()``.

The toolkit rebinds names in ``torch.nn``. Here construction is what is watched, by
``quantpatch.quantize_modules``: names imported earlier are covered, ``torch.nn`` keeps its own classes,
and the end restores all of PyTorch exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

from pytorch_quantization import _onnx
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.nn import TensorQuantizer
from quantpatch import quantize_modules

__all__ = ["QuantModuleReplacementHelper", "deactivate", "enable_onnx_export", "initialize"]


class _quant_entry(NamedTuple):  # scripts know it by this name
    orig_mod: ModuleType
    mod_name: str
    replace_mod: Any


_DEFAULT_QUANT_MAP = [
    _quant_entry(torch.nn, name, getattr(quant_nn, f"Quant{name}"))
    for name in (
        *("Conv1d", "Conv2d", "Conv3d"),
        *("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
        *("Linear", "LSTM", "LSTMCell"),
        *("AvgPool1d", "AvgPool2d", "AvgPool3d"),
        *("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"),
    )
]


class QuantModuleReplacementHelper:
    """What is replaced by what, and the switch for it.

    Attributes:
        quant_map: The replacements, as ``(module, name, replacement)``.
        orginal_func_map: The originals of the same, as ``(module, name, original)``. Its name is spelled
            as scripts spell it.
    """

    def __init__(self) -> None:
        self.quant_map: set[_quant_entry] = set()
        self.orginal_func_map: set[_quant_entry] = set()
        self._custom: set[_quant_entry] = set()  # the part of quant_map that is the caller's
        self._scope: Any = None  # what is open, between apply and restore

    def prepare_state(
        self,
        float_module_list: Iterable[str] | None = None,
        custom_map: Iterable[tuple[Any, str, Any]] | None = None,
    ) -> None:
        """Adds to the replacements; nothing is patched yet.

        What earlier calls added stays, but for names that this one wants otherwise.

        Args:
            float_module_list: Names of layers to leave float.
            custom_map: Replacements ``(module, name, replacement)``, which override the default ones.

        Raises:
            AttributeError: A module has no such name.
        """
        custom = [_quant_entry(*entry) for entry in custom_map or ()]
        originals = {id(_original(entry)) for entry in custom}
        kept = {entry for entry in self._custom if id(_original(entry)) not in originals}
        self._custom = kept | set(custom)
        taken = {id(_original(entry)) for entry in self._custom}
        floats = set(float_module_list or ())
        self.quant_map = self._custom | {
            entry
            for entry in _DEFAULT_QUANT_MAP
            if entry.mod_name not in floats and id(_original(entry)) not in taken
        }
        self.orginal_func_map |= {entry._replace(replace_mod=_original(entry)) for entry in self.quant_map}

    def apply_quant_modules(self) -> None:
        """Puts the replacements in force, in place of those in force before.

        Raises:
            quantpatch.errors.EntryError: A replacement cannot be used; what was in force before stays so.
        """
        before, self._scope = self._scope, None
        if before is not None:
            before.stop()
        # quantpatch's own layers and those of plugins have no part in it.
        scope = quantize_modules(skip="*", plugins=(), custom=self._entries())
        try:
            self._scope = scope.start()
        except BaseException:
            self._scope = None if before is None else before.start()
            raise

    def _entries(self) -> list[_quant_entry]:
        return sorted(self.quant_map, key=lambda entry: (entry.orig_mod.__name__, entry.mod_name))

    def restore_float_modules(self) -> None:
        """Layers come out float again, and PyTorch is what it was; forgets the replacements."""
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.stop()
        for entries in (self.quant_map, self.orginal_func_map, self._custom):
            entries.clear()


def _original(entry: _quant_entry) -> Any:
    return getattr(entry.orig_mod, entry.mod_name)


_helper = QuantModuleReplacementHelper()


def initialize(
    float_module_list: Iterable[str] | None = None,
    custom_quant_modules: Iterable[tuple[Any, str, Any]] | None = None,
) -> None:
    """From now on layers come out quantized, in the whole process.

    Convolutions, transposed convolutions, linear layers, LSTMs and average pooling. A second call adds to
    the first.

    Args:
        float_module_list: Names of layers to leave float, such as ``"Linear"``.
        custom_quant_modules: Replacements of your own, ``(module, name, replacement)``; they are not
            subject to ``float_module_list``.

    Raises:
        AttributeError: A module has no such name.
        quantpatch.errors.EntryError: A replacement cannot be used. Nothing has changed.
    """
    before = {name: set(value) for name, value in vars(_helper).items() if isinstance(value, set)}
    try:
        _helper.prepare_state(float_module_list, custom_quant_modules)
        _helper.apply_quant_modules()
    except BaseException:
        vars(_helper).update(before)
        raise


def deactivate() -> None:
    """Layers come out float again, and PyTorch is exactly what it was; harmless if they did already."""
    _helper.restore_float_modules()


@contextmanager
def enable_onnx_export() -> Iterator[None]:
    """Quantizers are exported as ``QuantizeLinear`` and ``DequantizeLinear`` inside this block.

    ::

        with enable_onnx_export():
            torch.onnx.export(model, args, "model.onnx", opset_version=13)

    Nothing of it is left afterwards, also if the export fails.
    """
    before = TensorQuantizer._enable_onnx_export
    TensorQuantizer._enable_onnx_export = True
    try:
        with _onnx.exporting():
            yield
    finally:
        TensorQuantizer._enable_onnx_export = before
