"""What an export reports: what it wrote, and how that compares with the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs
from rich.table import Table

from quantpatch.errors import listed
from quantpatch.reports.latency import BesideFloat
from quantpatch.reports.report import Report, facts_table


@attrs.frozen
class Latency(BesideFloat):
    """How long a file takes in the runtime that it is for.

    Attributes:
        ms: Of the file, a median.
        float_ms: Of the same file in float.
        on_floats: Names of the layers whose weights are quantized, but run on float kernels.
        without_kernels: The formats of activations that integer kernels do not take as they are.
        padded: Names of the convolutions of 1 to 3 channels, which integer kernels pad to 4.
    """

    on_floats: tuple[str, ...] = ()
    without_kernels: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.ms:.3g} ms here, {self.ratio:.2f} of float ({self.float_ms:.3g} ms)"
        return text if not self.on_floats else f"{text}; on float kernels: {listed(self.on_floats)}"

    def advice(self, name: str) -> str:
        """What to do about a file that is slower than float."""
        times = f"{self.ms:.3g} and {self.float_ms:.3g} ms"
        text = f"{name} takes {self.ratio:.2f} times as long as in float here ({times})"
        if self.without_kernels:
            formats = listed(self.without_kernels)
            advice = f"Integer kernels take activations of 8 bits as they are; here are {formats}. Use int8"
        else:
            advice = (
                "qp.prepare(model, args) before calibration, if it was not called, puts quantizers where "
            )
            advice += "kernels want them"
        if self.on_floats:
            text += (
                f". Of these layers the weights are quantized, but the kernels are float: "
                f"{listed(self.on_floats)}. {advice}; or leave them float (skip=[...], or disable() their "
                f"quantizers)"
            )
        else:
            text += ". Its layers run on integers, but what is between them costs more than that gains. "
            text += advice
            if self.padded:
                text += (
                    f". The images that {listed(self.padded)} takes are padded to 4 channels, which may "
                    f"cost more than integers gain: qp.configure(model, {{{self.padded[0]!r}: None}}) leaves "
                    f"it float"
                )
        return f"{text}. export_onnx(..., latency=False) does not measure"


@attrs.frozen
class Comparison:
    """A file's results against the model's, over the given inputs and random ones.

    Attributes:
        largest_difference: Of all outputs.
        relative_difference: The same, over the largest magnitude of the output.
        integers: How many integers of quantized activations were compared.
        differing: How many of them differ. A product that is summed in another order may end on the other
            side of the edge between two integers, and what follows from it.
        mismatching: How many differ from what the model's quantizers make of the very floats that the file
            quantizes. None should.
        within_step: The share of output values that are within a quantization step, that of the output's own
            quantizer or 1/127 of the largest value, of the model's when the runtime that the file is for runs
            it, on integer kernels (ONNX Runtime with its optimizations on); None if it was not run there.
        on_integers: The layers that run on integer kernels there: which kernel.
        unlike: What the runtime computes otherwise than the file says if it is opened with its defaults;
            empty if that is nothing.
        kernels: How many integer kernels ONNX Runtime's optimized graph has that could be compared alone.
        kernels_within_step: The share of the values of these that are within a step of what the file says of
            the very inputs that the kernel got; None if there are none. An integer on the edge that changes
            all behind it, which ``within_step`` counts, has no part in it.
        not_run: Why nothing was compared; empty if it was.
        not_random: Why the given inputs alone were compared; empty if random ones were as well.
        latency: How long the file takes beside the same in float; None if that was not measured.
    """

    largest_difference: float = 0.0
    relative_difference: float = 0.0
    integers: int = 0
    differing: int = 0
    mismatching: int = 0
    within_step: float | None = None
    on_integers: Mapping[str, str] = attrs.field(factory=dict)
    unlike: str = ""
    kernels: int = 0
    kernels_within_step: float | None = None
    not_run: str = ""
    not_random: str = ""
    latency: Latency | None = None

    @property
    def differing_share(self) -> float:
        """The share of the integers that differ."""
        return self.differing / self.integers if self.integers else 0.0

    def facts(self) -> dict[str, object]:
        """What there is to say, by what it is about."""
        if self.not_run:
            return {"not compared": self.not_run}
        alone = f"; of each kernel alone {self.kernels_within_step:.2%}" if self.kernels else ""
        within = None if self.within_step is None else f"{self.within_step:.2%} within a step{alone}"
        return {
            "largest difference": f"{self.largest_difference:.3g}; relative {self.relative_difference:.2g}",
            "integers differ": f"{self.differing:,} of {self.integers:,}",
            "integers mismatch": f"{self.mismatching:,}, where the same floats were quantized",
            "in the runtime": within,
            "on integers": f"{len(self.on_integers)} layers" if self.on_integers else "",
            "on the given inputs alone": self.not_random,
            "note": self.unlike,
            "latency": self.latency,
        }


@attrs.frozen
class ExportReport(Report):
    """What ``export_onnx`` wrote.

    Attributes:
        path: The file.
        runtime: What it is for.
        opset: Version of its operators.
        nodes: How many nodes there are of each operator.
        bytes: Its size, with that of its data file.
        quantizers: Names of the quantizers in it.
        unreached: Names of those without a range, which are not in it: neither calibration nor the given
            arguments reach them.
        comparison: How its results compare to the model's, and how long it takes; None if that was not asked
            for.
    """

    path: Path
    runtime: str
    opset: int
    nodes: Mapping[str, int]
    bytes: int
    quantizers: tuple[str, ...]
    unreached: tuple[str, ...]
    comparison: Comparison | None

    _rows = ()

    def __rich__(self) -> Table:
        nodes = ", ".join(
            f"{count} {name}" for name, count in sorted(self.nodes.items(), key=lambda n: -n[1])
        )
        compared = {} if self.comparison is None else self.comparison.facts()
        facts = {"bytes": f"{self.bytes:,}", "opset": self.opset, "nodes": nodes, **compared}
        facts["never reached, so not in it"] = listed(self.unreached)
        return facts_table(f"{self.path} for {self.runtime}", facts)
