"""The plugin manual: every hook a plugin can implement.

A plugin is a module (or any object) with functions marked ``@quantpatch.hookimpl``, named in its
distribution's entry-point group ``quantpatch``; the entry point's name is the plugin's name. It states
the versions of the plugin API it works with, ``quantpatch_api = (oldest, newest)``. Hooks return values
and change nothing. quantpatch's own layers, recipes, formats, calibrators, runtimes and tuners
come in through these same hooks, from the plugin ``quantpatch.builtin``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from quantpatch.calibrators import Calibrator
    from quantpatch.numerics.formats import NumberFormat
    from quantpatch.plugins.entry import EntryLike
    from quantpatch.plugins.example import Example
    from quantpatch.plugins.runtime import Runtime
    from quantpatch.recipes.descriptor import Recipe
    from quantpatch.tuning import Tuner

__all__ = [
    "API_VERSION",
    "PROJECT",
    "hookimpl",
    "quantpatch_calibrators",
    "quantpatch_entries",
    "quantpatch_examples",
    "quantpatch_formats",
    "quantpatch_recipes",
    "quantpatch_runtimes",
    "quantpatch_tuners",
]

PROJECT = "quantpatch"

#: Version of the plugin API: of the hooks below, and of what plugins build on (``QuantizedLayer``, ``Entry``,
#: ``Recipe``, ``NumberFormat``, ``Calibrator``, ``Runtime``, ``Tuner``). It rises when a plugin written for
#: the version before may no longer work; a new hook alone does not raise it.
API_VERSION = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def quantpatch_entries() -> Iterable[EntryLike]:
    """What this plugin replaces: entries, or plain tuples ``(module, name, replacement)``.

    Called once, when the first block opens (or the plugins are listed). Name the module and the
    replacement as text, so that nothing is imported before the user has imported the target::

        @quantpatch.hookimpl
        def quantpatch_entries():
            return [("my_package.layers", "MyConv", "my_plugin.layers:QuantMyConv")]

    An entry replaces the built-in one for the same target. Two plugins that replace one target are a
    conflict, which the user settles with ``skip``, ``custom`` or by blocking one of them.

    Returns:
        The entries, in any order.
    """
    raise NotImplementedError


@hookspec
def quantpatch_examples() -> Iterable[Example]:
    """How to build what this plugin replaces, so that ``pytest --quantpatch-conformance`` can try it.

    Called when conformance tests are collected, and never when a model is built, so that it may import what
    it needs. Every entry wants at least one example; one without is reported as a failure::

        @quantpatch.hookimpl
        def quantpatch_examples():
            import torch
            from my_package.layers import MyConv

            return [
                quantpatch.Example(
                    "my_package.layers.MyConv",
                    build=lambda: MyConv(4, 8),
                    inputs=lambda: (torch.randn(2, 4, 5),),
                )
            ]

    If the target's package is optional, import it inside ``build``: where it is not installed the entry is
    skipped, and said to be.

    Returns:
        The examples, in the order to try them.
    """
    raise NotImplementedError


@hookspec
def quantpatch_recipes() -> Mapping[str, Recipe]:
    """Recipes that users can ask for by name: ``quantize_modules(recipe="name")``.

    Called once, when a recipe is first looked up::

        @quantpatch.hookimpl
        def quantpatch_recipes():
            weight = quantpatch.QuantDescriptor(num_bits=4, axis="channel", narrow_range=True)
            return {"my-w4": quantpatch.Recipe(name="my-w4", input=None, weight=weight)}

    Returns:
        Recipe by name. A name that another plugin uses already is an error that names both.
    """
    raise NotImplementedError


@hookspec
def quantpatch_formats() -> Mapping[str, NumberFormat]:
    """Number formats that descriptors can ask for by name: ``QuantDescriptor(format="name")``.

    Called once, when a format is first looked up::

        @quantpatch.hookimpl
        def quantpatch_formats():
            return {"power_of_two": PowerOfTwo(bits=4)}

    An ONNX file can have what a format's ``onnx`` says: ``OnnxCodes("INT8")`` where QuantizeLinear to that
    type rounds as the format does, ``OnnxCodes("INT4", rounds=False)`` where only the codes are of that type,
    for weights alone. By default it is None, and ``export_onnx`` refuses the format.

    Returns:
        Format by name. A name that another plugin uses already is an error that names both.
    """
    raise NotImplementedError


@hookspec
def quantpatch_calibrators() -> Mapping[str, type[Calibrator]]:
    """Calibrators that users can ask for by name: ``calibrate(model, batches, method="name")``.

    Called once, when a calibrator is first looked up::

        @quantpatch.hookimpl
        def quantpatch_calibrators():
            return {"three_sigma": ThreeSigmaCalibrator}

    With a zero point (``calibrate(model, batches, zero_points=True)``) a calibrator gets how far the longer
    side of the range must reach for each element. Its ``zero_point`` is then how many of the integers are for
    the shorter side, and may change once all data was seen: read it, or ``qparams``, where the range is
    computed.

    Returns:
        Subclass of ``quantpatch.calibrators.Calibrator`` by name. A name that another plugin uses
        already is an error that names both.
    """
    raise NotImplementedError


@hookspec
def quantpatch_runtimes() -> Mapping[str, Runtime]:
    """Runtimes that users can prepare and export a model for by name: ``prepare(model, x, runtime="name")``.

    Called once, when a runtime is first looked up::

        @quantpatch.hookimpl
        def quantpatch_runtimes():
            npu = quantpatch.Runtime(zero_points=False, refuses="quantpatch_mylib.npu:why_refused")
            return {"npu": npu}

    With ``opens``, a function of a path and a number of threads that returns what runs the file, the export's
    check runs it there and measures its latency; ``kernels`` may say what of it runs on integers. Both have
    their types in ``quantpatch.plugins``.

    Returns:
        Runtime by name. A name that another plugin uses already is an error that names both.
    """
    raise NotImplementedError


@hookspec
def quantpatch_tuners() -> Mapping[str, type[Tuner] | str]:
    """Methods that users can ask for by name: ``tune(model, batches, method="name")``.

    Called once, when a method is first looked up::

        @quantpatch.hookimpl
        def quantpatch_tuners():
            return {"stochastic": "my_plugin.stochastic:Stochastic"}

    Returns:
        Subclass of ``quantpatch.tuning.Tuner`` by name, or where it is: ``"package.module:ClassName"``, which
        is imported when that name is asked for. A name that another plugin uses already is an error that
        names both.
    """
    raise NotImplementedError
