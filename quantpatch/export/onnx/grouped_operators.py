"""Grouped matrix products, as of mixtures of experts: rows in the order of groups, a matrix for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

# PyTorch's own, and that of transformers for tensors which PyTorch's kernel does not take. Both are called
# with rows (rows, in), matrices (groups, in, out), and where each group ends among the rows.
_OPERATORS = (("aten", "_grouped_mm"), ("transformers", "grouped_mm_fallback"))


def grouped_products() -> Iterator[Any]:
    """Those that are there."""
    for namespace, name in _OPERATORS:
        found = getattr(getattr(torch.ops, namespace), name, None)
        if found is not None:
            yield found.default


def grouped_to_onnx(op: Any) -> Callable[..., Any]:
    """What such a product becomes in ONNX, which has no operator for it: a product for each group."""

    def translated(rows: Any, matrices: Any, ends: Any, bias: Any = None, out_dtype: Any = None) -> Any:
        groups = matrices.shape[0]
        if bias is not None or out_dtype is not None or len(rows.shape) != 2 or len(matrices.shape) != 3:
            raise NotImplementedError("a grouped product other than of rows by matrices, in their type")
        axis = op.Constant(value_ints=[0])
        one = op.Constant(value_int=1)
        ends = op.Cast(ends, to=7)
        split: Any = (lambda x: op.Split(x, axis=0, num_outputs=groups)) if groups > 1 else (lambda x: (x,))
        products, start = [], op.Constant(value_int=0)
        for end, matrix in zip(split(ends), split(matrices), strict=True):
            end = op.Squeeze(end, axis)
            of_it = op.Gather(rows, op.Range(start, end, one), axis=0)
            products.append(op.MatMul(of_it, op.Squeeze(matrix, axis)))
            start = end
        return op.Concat(*products, axis=0)

    return translated
