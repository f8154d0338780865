"""A program compiled by PyTorch's own compiler: in memory, or to a file."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from quantpatch.errors import ExportError
from quantpatch.export.prepare.exported import ExportedQuantizer
from quantpatch.export.program.capture import captured
from quantpatch.export.program.inputs import Inputs
from quantpatch.export.program.kernels import Recorder
from quantpatch.export.program.passes import before_compiling
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.atomic_files import written_whole


class Build:
    """A model's program, and what is compiled of it.

    Args:
        model: The model, in eval mode.
        args: Its arguments.
        kwargs: Its keyword arguments.
        found: Its quantizers.
        dynamic_shapes: As ``torch.export.export`` takes it.

    Attributes:
        constants: The program's tensors by name.
        inputs: What it takes.
        recorder: The kernels in what was compiled.
        reasons: Why weights are read as floats, by the names of their quantizers, and products, by theirs.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        found: Sequence[ExportedQuantizer],
        dynamic_shapes: Any,
    ) -> None:
        self._args, self._kwargs, self._dynamic_shapes = args, dict(kwargs), dynamic_shapes
        program = captured(model, args, kwargs, found, dynamic_shapes=dynamic_shapes, as_uint8=True)
        self._program = program.run_decompositions({})
        self.constants: dict[str, Tensor] = dict(self._program.state_dict)
        self.inputs = Inputs(args, self._kwargs, self._program)
        self.recorder = Recorder(self.constants)
        self.reasons: dict[str, str] = {}

    def in_memory(self) -> Callable[..., Any]:
        """The compiled model."""
        from torch._inductor.compile_fx import compile_fx

        module, out_spec = self._module(), self._program.call_spec.out_spec
        module.graph.set_codegen(CodeGen())
        users = set(self._program.graph_signature.user_inputs)
        examples: list[Any] = [*self.inputs.flat(self._args, self._kwargs)]
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        for node in placeholders:
            if not isinstance(node.meta.get("val"), Tensor) and not node.users:
                module.graph.erase_node(node)
        module.recompile()
        mode: Any = None
        if self._dynamic_shapes is not None:
            nodes = [n for n in self._program.graph.nodes if n.op == "placeholder" and n.name in users]
            examples = [v for n in nodes if isinstance(v := n.meta.get("val"), Tensor)]
            mode = examples[0].fake_mode if examples else None
        with torch.no_grad(), _tracing_with(mode):
            try:
                compiled: Any = compile_fx(module, examples, config_patches=self._options())
            except Exception as error:
                raise _not_compiled(error) from error

        def run(*args: Any, **kwargs: Any) -> Any:
            return pytree.tree_unflatten(list(compiled(*self.inputs.flat(args, kwargs))), out_spec)

        return run

    def to_file(self, path: Path) -> Callable[..., Any]:
        """The compiled model, from a package that is written."""
        module = self._module()
        with torch.no_grad():
            program = torch.export.export(
                module, self._args, self._kwargs, dynamic_shapes=self._dynamic_shapes, strict=False
            )
            with written_whole(path) as folder:
                try:
                    torch._inductor.aoti_compile_and_package(
                        program,
                        package_path=str(folder / f"{path.stem}.pt2"),
                        inductor_configs=self._options(),
                    )
                except Exception as error:
                    raise _not_compiled(error) from error
                if path.suffix != ".pt2":
                    (folder / f"{path.stem}.pt2").rename(folder / path.name)
        loaded: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
        return loaded

    def _module(self) -> GraphModule:
        takes = inspect.signature(self._program.module).parameters
        module: Any = self._program.module(**({"check_guards": False} if "check_guards" in takes else {}))
        self.constants |= before_compiling(module, self.reasons)
        return copy.copy(module)  # type: ignore[no-any-return]

    def _options(self) -> dict[str, Any]:
        return {"freezing": True, "post_grad_custom_pre_pass": self.recorder.as_pass()}


def _tracing_with(mode: Any) -> Any:
    """A block in which the compiler knows the symbols of a program's shapes."""
    from torch._guards import TracingContext
    from torch._guards import tracing as with_context

    return with_context(None if mode is None else TracingContext(mode))


def _not_compiled(error: Exception) -> ExportError:
    words = str(error).strip().partition("\n")[0]
    return ExportError(f"PyTorch's compiler failed: {type(error).__name__}: {words}")
