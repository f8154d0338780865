"""``lower``: a quantized model on integer kernels, by torch's own compiler.

Torch's compiler knows integer kernels, oneDNN's, by one pattern of operators (``capture.py`` writes it). They
are fused with activations, additions and the quantizers behind them when weights are constants ("freezing").
"""

from __future__ import annotations

import copy
import inspect
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from quantpatch.errors import ExportError, InputError, warn_caller
from quantpatch.export.prepare.exported import ExportedQuantizer
from quantpatch.export.program.capture import captured
from quantpatch.export.program.export import checked_operands
from quantpatch.export.program.kernels import KernelCheck, Recorder, check_kernels, why_float
from quantpatch.export.program.needs import demand_compiler, demand_cpu, instructions
from quantpatch.export.program.passes import before_compiling
from quantpatch.export.program.report import CompiledLatency, LoweringComparison, LoweringReport
from quantpatch.layers.quantizer import in_float
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.atomic_files import written_whole
from quantpatch.torch_tools.forward import arguments, demand_model, evaluating, uncompiled
from quantpatch.torch_tools.progress import Bar, progress_bar
from quantpatch.torch_tools.random_inputs import random_like
from quantpatch.torch_tools.tracing import tracing

_USER = InputKind.USER_INPUT
_SECONDS, _ROUNDS, _LEAST = 0.5, 50, 5


class LoweredModel(nn.Module):
    """A model on integer kernels, as ``lower`` made it: for inference, on inputs as those it was given.

    Attributes:
        report: What runs on integers, and how that compares.
    """

    def __init__(self, run: Callable[..., Any], inputs: _Inputs, report: LoweringReport) -> None:
        super().__init__()
        self._run = run
        self._inputs = inputs
        self.report = report
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives.

        Raises:
            InputError: The inputs are of other types or shapes than those it was lowered for.
        """
        self._inputs.check(args, kwargs)
        with torch.no_grad():
            return self._run(*args, **kwargs)

    def train(self, mode: bool = True) -> LoweredModel:
        """Stays in eval mode: its weights are constants of compiled code."""
        return super().train(False)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a lowered model holds compiled code, which is neither copied nor pickled: write "
            "qp.lower(model, args, path='model.pt2') for a file of it"
        )


class _Inputs:
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


def lower(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    path: str | os.PathLike[str] | None = None,
    check: bool = True,
    latency: bool = True,
    progress: bool = True,
) -> LoweredModel:
    """Compiles a quantized model to integer kernels, with PyTorch's own compiler, for CPUs.

    Quantized ``Linear``, ``Conv1d`` and ``Conv2d`` layers become oneDNN's integer kernels, with the
    activation, the addition and the quantizer behind them inside; all else is compiled as float. Which layers
    these are is in the report, from the compiler's own graph. The model is unchanged.

    Call ``prepare(model, args, runtime="inductor")`` before calibration.

    Args:
        model: The model, its ranges known, on the CPU.
        args: Arguments to run it on: a tensor, or a tuple.
        kwargs: Keyword arguments to run it on.
        dynamic_shapes: As ``torch.export.export`` takes it; what is not dynamic is fixed.
        path: Where to write a package of compiled code (``.pt2``), which
            ``torch._inductor.aoti_load_package`` loads without quantpatch, and libtorch from C++; None to
            compile in memory.
        check: Whether to compare with the model, on the arguments and on random ones.
        latency: Whether to measure how long it takes beside the model in float and in bfloat16, both compiled
            alike for it. That takes twice as long as the lowering itself.
        progress: Whether to show what is being done (on a terminal only).

    Returns:
        The compiled model, with its ``report``.

    Raises:
        ExportError: There is no kernel for some of the formats, the model cannot be traced, it is not on the
            CPU, or there is no C++ compiler or no folder for its results.

    Warns:
        QuantPatchWarning: No layer runs on integers, it is slower than float, or the processor has no
            instructions for products of integers.
    """
    demand_model(model, "lower")
    model = uncompiled(model)
    args, kwargs = arguments(args, kwargs)
    demand_cpu(model, (args, kwargs))
    demand_compiler()
    multiplied_with = instructions()
    name, steps = type(model).__name__, 1 + check + 2 * latency
    bar = progress_bar(name, steps, progress=progress)
    with tracing(), evaluating(model), bar as shown, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about what it calls itself
        found = checked_operands(model)
        shown.step("compiling")
        built = _Build(model, args, kwargs, found, dynamic_shapes)
        package = None if path is None else Path(path)
        run = built.in_memory() if package is None else built.to_file(package)
        compared = measured = None
        if check:
            shown.step("checking the result")
            compared = _compare(model, run, built, args, kwargs)
        if latency:
            measured = _measure(model, run, args, kwargs, dynamic_shapes, shown)
    integers, skipped = _layers(found, built.recorder)
    report = LoweringReport(integers, skipped, multiplied_with, compared, measured, package)
    if found and not integers:
        warn_caller(f"{type(model).__name__} was lowered, and no layer of it runs on integers:\n  {report}")
    elif measured is not None and measured.is_slower:
        warn_caller(report.advice())
    return LoweredModel(run, built.inputs, report)


class _Build:
    """A model's program, and what is compiled of it."""

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
        self.inputs = _Inputs(args, self._kwargs, self._program)
        self.recorder = Recorder(self.constants)

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
        self.constants |= before_compiling(module)
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


# --- What came of it ---------------------------------------------------------------------------------------


def _layers(found: Sequence[ExportedQuantizer], recorder: Recorder) -> tuple[dict[str, str], dict[str, str]]:
    """The layers that run on integers, and why the others do not."""
    kernels: dict[str, str] = {}
    for kernel in recorder.kernels:  # of a weight in parts, there is one for each
        kernels.setdefault(kernel.weight.partition("[")[0], str(kernel))
    quantized = {id(operand.layer) for operand in found if operand.weight is None}
    weights = [operand for operand in found if operand.weight is not None]
    count = Counter(id(operand.layer) for operand in weights)
    integers: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for operand in weights:
        layer = operand.name.rpartition(".")[0]
        # Attention has several weights, each with a kernel of its own, or none.
        name = layer if layer and count[id(operand.layer)] == 1 else operand.name.removesuffix("_quantizer")
        if operand.name in kernels:
            integers[name] = kernels[operand.name]
        else:
            why = why_float(operand.layer) if operand.layer is not None else None
            if why is None and id(operand.layer) not in quantized:
                why = "its input is float, and integer kernels take integers on both sides"
            skipped[name] = why or "the compiler found no kernel for how its operands are computed"
    return integers, skipped


def _compare(
    model: nn.Module, run: Callable[..., Any], built: _Build, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LoweringComparison:
    largest = relative = 0.0
    count = within = 0
    checked = KernelCheck()
    not_random = ""
    for index, (given, named) in enumerate(((args, dict(kwargs)), random_like(args, kwargs))):
        with torch.no_grad():
            try:
                expected = _tensors(model(*given, **named))
            except Exception as error:
                if not index:
                    raise
                not_random = f"the model takes no others ({type(error).__name__})"
                break
            results = _tensors(run(*given, **named))
            if not index:
                checked = check_kernels(built.recorder, built.constants, [*built.inputs.flat(given, named)])
        for ours, theirs in zip(expected, results, strict=True):
            size = ours.abs().max().item() if ours.numel() else 0.0
            off = (ours - theirs).abs().masked_fill((ours == theirs) | (ours.isnan() & theirs.isnan()), 0.0)
            if off.numel():
                largest = max(largest, off.max().item())
                relative = max(relative, off.max().item() / max(size, 1e-30))
            count += off.numel()
            within += int((off <= 1.001 * size / 127).sum())
    return LoweringComparison(
        largest,
        relative,
        within / count if count else 1.0,
        checked.integers,
        checked.differing,
        checked.furthest,
        not_random,
    )


def _tensors(outputs: Any) -> list[Tensor]:
    return [x.detach().double() for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


def _measure(
    model: nn.Module,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    shown: Bar,
) -> CompiledLatency:
    """Latencies, measured in turn, so that what else the machine does counts for all."""
    shown.step("compiling it in float, to measure beside")
    with in_float(model):
        calls = [
            (run, args, kwargs),
            (_Build(model, args, kwargs, [], dynamic_shapes).in_memory(), args, kwargs),
        ]
        try:
            half = copy.deepcopy(model).to(torch.bfloat16)
            few, named = pytree.tree_map(_as_bfloat16, (args, dict(kwargs)))
            calls.append((_Build(half, few, named, [], dynamic_shapes).in_memory(), few, named))
        except Exception:  # a model may not be copied, or not run in bfloat16: then that is not measured
            del calls[2:]
    shown.step("measuring")
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    with torch.no_grad():
        for call, given, named in calls:
            call(*given, **named)
        for done in range(_ROUNDS):
            if done >= _LEAST and time.perf_counter() - start > _SECONDS * len(calls):
                break
            for (call, given, named), taken in zip(calls, times, strict=True):
                before = time.perf_counter()
                call(*given, **named)
                taken.append(time.perf_counter() - before)
    medians = [1e3 * statistics.median(taken) for taken in times]
    return CompiledLatency(medians[0], medians[1], medians[2] if len(medians) > 2 else None)


def _as_bfloat16(x: Any) -> Any:
    return x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x
