"""What ``lower`` reports: which layers run on integers, how that compares, and how long it takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs

from quantpatch.errors import listed
from quantpatch.reports.latency import BesideFloat
from quantpatch.reports.report import Report


@attrs.frozen
class CompiledLatency(BesideFloat):
    """How long a lowered model takes, beside the same model in float, compiled by the same compiler.

    Attributes:
        ms: Of the lowered model.
        float_ms: Of the model in float.
        bfloat16_ms: Of the model in bfloat16; None if it could not be measured.
    """

    bfloat16_ms: float | None = None

    def __str__(self) -> str:
        text = f"{self.ms:.3g} ms here, {self.ratio:.2f} of compiled float ({self.float_ms:.3g} ms)"
        if self.bfloat16_ms is not None:
            text += f", {self.ms / self.bfloat16_ms:.2f} of bfloat16 ({self.bfloat16_ms:.3g} ms)"
        return text


@attrs.frozen
class LoweringComparison:
    """A lowered model's results against the model's, over the given inputs and random ones.

    Attributes:
        largest_difference: Of all outputs.
        relative_difference: The same, over the largest magnitude of the output.
        within_step: The share of output values that are within 1/127 of the largest of the model's.
        integers: How many integers of kernels were compared with what the model's arithmetic makes of the
            very integers that the kernel got.
        differing: How many of them differ: kernels multiply by the inverse of a scale, where the model
            divides, and sum in another order, so that a value halfway between two integers may become the
            other one.
        furthest: By how many steps they differ at most.
        not_random: Why the given inputs alone were compared; empty if random ones were as well.
    """

    largest_difference: float
    relative_difference: float
    within_step: float
    integers: int = 0
    differing: int = 0
    furthest: int = 0
    not_random: str = ""

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest_difference:.3g} ({self.relative_difference:.2g} of the "
            f"output), {self.within_step:.2%} within a step; {self.differing} of {self.integers} integers of "
            f"kernels differ"
            + (f", by {self.furthest} at most" if self.differing else "")
            + (f"; on the given inputs alone: {self.not_random}" if self.not_random else "")
        )


@attrs.frozen
class LoweringReport(Report):
    """What ``lower`` made of a model.

    Attributes:
        integers: The layers that run on integer kernels, by name (of a layer with several weights: the
            weights), and what each kernel computes: as the compiler's own graph has them.
        skipped: The other layers with quantized weights, and why they run on float kernels.
        instructions: What this processor multiplies integers with.
        comparison: How the results compare with the model's; None if that was not asked for.
        latency: How long it takes; None if that was not asked for.
        path: The package that was written, or None.
    """

    integers: Mapping[str, str]
    skipped: Mapping[str, str]
    instructions: str
    comparison: LoweringComparison | None = None
    latency: CompiledLatency | None = None
    path: Path | None = None

    def __str__(self) -> str:
        count = len(self.integers)
        lines = [f"{count} of {count + len(self.skipped)} layers run on integers ({self.instructions})"]
        lines += [f"{name} runs on floats: {why}" for name, why in self.skipped.items()]
        lines += [str(part) for part in (self.comparison, self.latency) if part is not None]
        lines += [] if self.path is None else [f"written to {self.path}"]
        return "\n  ".join(lines)

    def advice(self) -> str:
        """What to do about a lowered model that is slower than float."""
        assert self.latency is not None
        times = f"{self.latency.ratio:.2f} times as long as in float here ({self.latency})"
        text = f"the lowered model takes {times}"
        if self.skipped:
            text += f". These layers run on float kernels: {listed(self.skipped)}"
        return (
            f'{text}. Call qp.prepare(model, args, runtime="inductor") before calibration if you have not: '
            f"it leaves float what has no kernel. lower(..., latency=False) does not measure"
        )

    def why_wrong(self) -> str:
        """What to do where kernels compute other integers than the model."""
        assert self.comparison is not None
        return (
            f"{self.comparison.differing} of {self.comparison.integers} integers of kernels differ from the "
            f"model's, by up to {self.comparison.furthest}: without instructions for products of 8-bit "
            f"integers (here: {self.instructions}) kernels compute with 16 bits, which saturate. Weights of "
            f'7 bits do not: QuantDescriptor(num_bits=7, axis="channel", narrow_range=True)'
        )
