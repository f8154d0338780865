"""``with quantize_modules(): ...`` and ``with keep_float(): ...``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from quantpatch.errors import ArgumentTypeError, BlockError, warn_caller
from quantpatch.interception.block import current, current_in_context
from quantpatch.interception.built_modules import Built
from quantpatch.interception.slots import lock
from quantpatch.interception.statements import Exit, Statement
from quantpatch.plugins.entry import EntryLike
from quantpatch.plugins.registry import registry
from quantpatch.quantize.operations import OperationRules
from quantpatch.quantize.options import Options
from quantpatch.quantize.outcome import Conversion, Lines, Outcome, Replaced, Skipped
from quantpatch.quantize.quantizing_block import QuantizingBlock
from quantpatch.quantize.reasons import Pattern
from quantpatch.quantize.rules import checked_rules
from quantpatch.recipes.builtin import DEFAULT_RECIPE
from quantpatch.recipes.descriptor import Recipe

F = TypeVar("F", bound=Callable[..., Any])


class Scope:
    """A block in which layers come out quantized; made by ``quantize_modules`` or ``keep_float``.

    A context manager, a decorator, or (``start``/``stop``) a setting of the whole process. The same
    object can be entered again, also inside itself and in several threads.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._blocks: list[QuantizingBlock] = []  # by calls of __enter__
        self._started: QuantizingBlock | None = None
        self._outcome = Outcome()

    def __repr__(self) -> str:
        return str(self._options)

    def __str__(self) -> str:
        return f"{self!r}\n{self._conversion}"

    def _repr_html_(self) -> str:
        return self._conversion._repr_html_()

    @property
    def _conversion(self) -> Conversion:
        """What came out of it so far, as ``convert`` returns it."""
        return Conversion(self.replaced, self.skipped)

    # --- opening and closing -------------------------------------------------------------------

    def _new_block(self) -> QuantizingBlock:
        around: Any = current()
        options = self._options
        if options.recipe is None and around is not None:
            # What is built in here belongs to the models of the block whose recipe it is.
            recipe, built, applies_rules = around.recipe, around.built, False
        else:
            recipe = registry.recipe(DEFAULT_RECIPE if options.recipe is None else options.recipe)
            applies_rules = bool(checked_rules(recipe.rules))
            built = Built() if applies_rules else None
        outside = None if around is None else around.with_operations
        inside = outside
        if options.operations is not None or options.keep_float:
            inside = Built() if options.operations is not None else None
        return QuantizingBlock(
            self,
            options.table(recipe, None if around is None else around.table),
            recipe,
            outcome=self._outcome,
            keep_float=options.keep_float,
            built=built,
            applies_rules=applies_rules,
            with_operations=inside,
            operations=options.operations,
            kept_out_of=outside if inside is not outside else None,
            strict=options.strict,
        )

    def __enter__(self) -> Scope:
        statement = Statement.entering(self)
        block = statement.opening = self._new_block()
        try:
            block.install()
            if not statement.is_real:
                with lock:
                    self._blocks.append(block)
            block.enter()
        except BaseException:
            block.close()
            raise
        return self

    if TYPE_CHECKING:

        def __exit__(
            self,
            exc_type: type[BaseException] | None,
            exc: BaseException | None,
            traceback: TracebackType | None,
        ) -> None: ...

    else:
        __exit__ = Exit(
            lambda scope, statement, failed: scope._close(
                statement.opening or scope._block_here(), failed=failed
            )
        )

    def _block_here(self) -> QuantizingBlock:
        """Of those that no ``with`` statement will close, the innermost that this object opened here.

        What is closed in another context than it was opened in, is the one opened last.
        """
        with lock:
            opened = [block for block in self._blocks if not block.closed]
        block: Any = current_in_context()
        while block is not None:
            if not block.closed and block in opened:
                found: QuantizingBlock = block
                return found
            block = block.parent
        if not opened:
            raise BlockError(f"{self!r} was left without having been entered")
        return opened[-1]

    def _close(self, block: QuantizingBlock, *, failed: bool) -> None:
        displaced = sorted(map(block.name_of, block.close()))
        if self._blocks:
            with lock:  # with those whose closing was interrupted
                self._blocks = [other for other in self._blocks if not other.closed]
        if failed:  # nothing gets in the way of an exception of the body
            return
        if displaced:
            warn_caller(
                f"while {self!r} was open, other code replaced the __init__ of {', '.join(displaced)} for "
                f"good: what was built afterwards may be float; audit the model"
            )
        block.quantize_operations()
        if block.applies_rules:
            block.apply_rules()

    def start(self) -> Scope:
        """Opens the block for the whole process, in every context that has no block of its own.

        Raises:
            BlockError: It is started already.
        """
        if self._started is not None and not self._started.closed:
            raise BlockError(f"{self!r}.start() was called twice; call stop() in between")
        block = self._new_block()
        try:
            block.install()
            self._started = block
            block.start()
        except BaseException:
            self._started = None
            block.close()
            raise
        return self

    def stop(self) -> None:
        """Ends what ``start`` began.

        Raises:
            BlockError: It is not started.
        """
        block = self._started
        if block is None:
            raise BlockError(
                f"{self!r}.stop() without start(); keep the block that was started: "
                f"block = quantize_modules(); block.start(); ...; block.stop()"
            )
        try:
            self._close(block, failed=False)
        finally:
            if block.closed:  # else it was interrupted before that, and can be stopped again
                self._started = None

    # --- as a decorator ------------------------------------------------------------------------

    def __call__(self, function: F) -> F:
        """Runs every call of a function, plain or ``async``, in a fresh block of the same settings.

        Raises:
            BlockError: It is a class or a generator function.
            ArgumentTypeError: It cannot be called.
        """
        if isinstance(function, type):
            raise BlockError(
                f"{self!r} cannot decorate the class {function.__qualname__}: it is not clear which of its "
                f"code should run in the block. Decorate the function that builds it, or its __init__"
            )
        if not callable(function):
            raise ArgumentTypeError(f"{self!r} decorates functions, not {function!r}", function=function)
        # Of an object that is called like a function, its class has the code.
        calls = (function, type(function).__call__)
        if any(inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call) for call in calls):
            raise BlockError(
                f"{self!r} cannot decorate the generator function {function!r}: the block would be open in "
                f"the caller's code between two yields. Put a with-block inside it"
            )
        if any(inspect.iscoroutinefunction(call) for call in calls):

            @functools.wraps(function)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                with Scope(self._options):
                    return await function(*args, **kwargs)

            return run_async  # type: ignore[return-value]

        async def awaited(coroutine: Any) -> Any:
            with Scope(self._options):
                return await coroutine

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with Scope(self._options):
                result = function(*args, **kwargs)
            # Of an async function that another decorator has wrapped nothing has run yet.
            return awaited(result) if inspect.iscoroutine(result) else result

        return run  # type: ignore[return-value]

    # --- what came out -------------------------------------------------------------------------

    @property
    def replaced(self) -> Lines[Replaced]:
        """What was replaced in this block so far, by which entry and plugin, and how often."""
        return self._outcome.replaced

    @property
    def skipped(self) -> Lines[Skipped]:
        """What was built in this block so far and left float, why, and how often."""
        return self._outcome.skipped


def quantize_modules(
    recipe: str | Recipe | None = None,
    *,
    skip: Iterable[Pattern] | Pattern = (),
    custom: Iterable[EntryLike] | EntryLike = (),
    include: Iterable[Pattern] | Pattern = (),
    plugins: Iterable[str] | None = None,
    subclasses: bool | None = None,
    operations: OperationRules | None = None,
    strict: bool = False,
) -> Scope:
    """Every layer constructed inside the block comes out as its quantized version.

    ::

        with quantize_modules("int8", skip=["ConvTranspose2d"]) as block:
            model = build_model()

    The class itself is watched, not its name: it does not matter how the code imported its layers.
    Only this thread (or asyncio task) is concerned; when the block ends, PyTorch is exactly what it
    was. Inside another block, this one starts from what the other replaces.

    Args:
        recipe: How to quantize: a recipe or its name. Default: that of the enclosing block, else int8. Rules
            in it are applied when the block ends, to the models that were built inside.
        skip: Targets to leave float: class names (``"Linear"``), dotted names (``"torch.nn.Linear"``),
            globs (``"AvgPool*"``) or classes; of targets, or of subclasses of one.
        custom: Entries ``(module, name, replacement)`` of your own; they override plugins and
            built-ins, and ``skip`` does not remove them. A function is replaced under its name in its module,
            not where it was imported earlier under a name of its own.
        include: Targets that are left float by default and that you want replaced, such as
            ``"Embedding"``.
        plugins: Names of the installed plugins that take part; default: all of them.
        subclasses: Whether a subclass of a target is quantized as well, as long as it leaves ``forward`` and
            what that uses as they are. What cannot be is in ``skipped``, with the reason. Default: as in the
            enclosing block, else False.
        operations: Which operations inside forwards are quantized, when the block ends, in the models that
            were built inside: ``"products"`` (all that multiply), names such as ``"matmul"`` or ``"add"``, or
            rules, the last of which wins: ``{"*.attn": {"matmul": "int8"}, "*": "products"}``. Where they
            are goes by the names of modules or of their classes; how, by a recipe, a descriptor, or None for
            float. The quantizers are called after operation, number and operand:
            ``attn.matmul_0_left_quantizer``. Default: as in the enclosing block, else none.
        strict: Whether it is an error that a forward may multiply where that cannot be followed.

    Returns:
        The block: a context manager, a decorator of functions, or something to ``start()`` and
        ``stop()``. Its ``replaced`` and ``skipped`` list what came out of the block.

    Raises:
        EntryError: An entry cannot be used (on entering the block; nothing is replaced then).
        EntryConflictError: Two plugins replace the same target.
        PluginError: A plugin failed.
        ArgumentError: A rule of the recipe is malformed (on entering) or matches nothing that was built (when
            the block ends: PyTorch is what it was, and the models are quantized as without rules).
        ArgumentTypeError: An argument is of another type, such as a model or a single number.
        UnknownNameError: There is nothing by a name in ``skip``, ``include``, ``recipe`` or ``plugins``.
    """
    return Scope(Options.of(recipe, skip, custom, include, plugins, subclasses, operations, strict))


def keep_float() -> Scope:
    """A block that builds float layers, whatever blocks are around it.

    That goes for what is built directly in it: a ``quantize_modules()`` inside it replaces again what was
    replaced around it.
    """
    return Scope(Options(keep_float=True))
