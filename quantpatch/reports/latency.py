"""How long something quantized takes, beside the same in float."""

from __future__ import annotations

import attrs

# A call itself takes some 10 us; below that many ms, and so near, it is not known which is faster.
_MEASURABLE, _NOISE = 0.05, 1.1


@attrs.frozen
class BesideFloat:
    """Two latencies, of which one is to be the smaller.

    Attributes:
        ms: Of what is quantized, a median.
        float_ms: Of the same in float.
    """

    ms: float
    float_ms: float

    @property
    def ratio(self) -> float:
        """Latency to that in float; below 1 is faster."""
        return self.ms / self.float_ms

    @property
    def is_slower(self) -> bool:
        """Whether it is slower than float, by more than what a few runs leave open."""
        return max(self.ms, self.float_ms) >= _MEASURABLE and self.ratio > _NOISE
