"""What a lowered model takes: inputs as those that it was compiled for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from quantpatch.errors import InputError

_USER = InputKind.USER_INPUT


class Inputs:
    """What a lowered model takes.

    Args:
        args: The arguments that it was lowered for.
        kwargs: The keyword arguments.
        program: The program that it was made of.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], program: torch.export.ExportedProgram
    ) -> None:
        self._keywords = tuple(kwargs)
        self._given, self._spec = pytree.tree_flatten((args, dict(kwargs)))
        users = [str(spec.arg.name) for spec in program.graph_signature.input_specs if spec.kind == _USER]
        values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
        self._values: list[Any] = [values.get(name) for name in users]

    def flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The inputs that are tensors, in the order of those that it was lowered for."""
        return [x for x in self._flattened(args, kwargs)[0] if isinstance(x, Tensor)]

    def _flattened(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
        first = {name: kwargs[name] for name in self._keywords if name in kwargs}
        leaves, spec = pytree.tree_flatten((args, {**first, **kwargs}))
        return leaves, spec

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Compares inputs.

        Raises:
            InputError: They are others.
        """
        leaves, spec = self._flattened(args, kwargs)
        if spec != self._spec:
            raise InputError(
                f"the lowered model takes arguments that are nested as {self._spec}, got {spec}: call it as "
                f"the model was called when it was lowered"
            )
        for given, constant, known in zip(leaves, self._given, self._values, strict=True):
            if not isinstance(constant, Tensor):
                if type(given) is not type(constant) or given != constant:
                    raise InputError(
                        f"the model was lowered for the value {constant!r} of an argument, a constant of the "
                        f"compiled code, got {given!r}: lower it for that value"
                    )
                continue
            if not isinstance(given, Tensor):
                raise InputError(f"the lowered model takes a tensor where it was given {given!r}")
            if given.dtype != known.dtype:
                raise InputError(
                    f"the model was lowered for inputs of {known.dtype}, got {given.dtype}: write "
                    f"x.to({known.dtype}), or lower it for such inputs"
                )
            fixed = [isinstance(size, int) for size in known.shape]
            same = len(fixed) == given.dim() and all(
                not is_fixed or have == want
                for is_fixed, have, want in zip(fixed, given.shape, known.shape, strict=True)
            )
            if not same:
                shape = [str(size) if isinstance(size, int) else "any" for size in known.shape]
                raise InputError(
                    f"the model was lowered for inputs of the shape ({', '.join(shape)}), got "
                    f"{tuple(given.shape)}: give dynamic_shapes to lower for others"
                )
