"""Why something was not tuned: a type for each reason, with what it is about. All are printed here."""

from __future__ import annotations

import attrs

from quantpatch.errors import listed
from quantpatch.quantize.reasons import Reason


@attrs.frozen
class NotQuantized(Reason):
    """Its quantizer is disabled, or does not quantize."""

    def __str__(self) -> str:
        return "it is not quantized"


@attrs.frozen
class NoData(Reason):
    """The data did not reach it, or it was multiplied by nothing in a way that is known."""

    def __str__(self) -> str:
        return (
            "no product of it with data was seen: none reached it, or it is looked up, or multiplied in a "
            "kernel of its own, as an LSTM's"
        )


@attrs.frozen
class Parametrized(Reason):
    """Its values are computed from other parameters."""

    def __str__(self) -> str:
        return "it is computed from other parameters (torch.nn.utils.parametrize)"


@attrs.frozen
class ReadByForward(Reason):
    """A forward reads it, or computes with it, before it is quantized."""

    def __str__(self) -> str:
        return "the forward of its class reads it by itself, and only what layers multiply by is tuned"


@attrs.frozen
class Tied(Reason):
    """Another module has the same tensor, and would be changed as well.

    Attributes:
        others: Its other names.
    """

    others: tuple[str, ...]

    def __str__(self) -> str:
        return f"its tensor is also {listed(self.others, 3)}"


@attrs.frozen
class AlreadyRounded(Reason):
    """It has been rounded already, so that nothing is left to choose, or it would leave its grid.

    Attributes:
        method: What has rounded it.
    """

    method: str

    def __str__(self) -> str:
        return f"{self.method} has rounded it already"


@attrs.frozen
class NoBias(Reason):
    """It has no bias that could be corrected."""

    def __str__(self) -> str:
        return "it has no bias"


@attrs.frozen
class OffGrid(Reason):
    """Rounded weights would be rounded once more, to other values, since their scales follow from them.

    Attributes:
        format: Name of the format.
    """

    format: str

    def __str__(self) -> str:
        return f"{self.format} rounds again what it has rounded"


@attrs.frozen
class NotBetter(Reason):
    """No choice was better than what was there.

    Attributes:
        error: What the method minimizes, as it was.
    """

    error: float

    def __str__(self) -> str:
        return "nothing was better than what was there"


@attrs.frozen
class NoExchange(Reason):
    """What it is multiplied by takes no factor for each channel.

    Attributes:
        why: What the value is, or where it comes from or goes to, as a clause.
    """

    why: str

    def __str__(self) -> str:
        return f"its input {self.why}, which takes no factor for a channel"


@attrs.frozen
class Different(Reason):
    """The model computed something else with it, so it was undone.

    Attributes:
        how: How, as a clause.
    """

    how: str

    def __str__(self) -> str:
        return f"{self.how} with it, so that was undone"


@attrs.frozen
class WrongFormat(Reason):
    """The method does not serve its format.

    Attributes:
        format: Name of the format.
        does: What the method does, as a clause.
    """

    format: str
    does: str

    def __str__(self) -> str:
        return f"its format is {self.format}, and the method {self.does}"


@attrs.frozen
class Recorded(Reason):
    """What a tuning said that this one went on from.

    Attributes:
        sentence: It.
    """

    sentence: str

    def __str__(self) -> str:
        return self.sentence
