"""``Tuner``: what a tuning method is; a plugin's subclasses this."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantpatch.tuning.tuning import Tuning


class Tuner(abc.ABC):
    """A method that makes a quantized model more accurate without labels.

    Children are values: frozen attrs classes, whose fields are the options that ``tune`` takes.
    """

    @abc.abstractmethod
    def tune(self, tuning: Tuning) -> None:
        """Tunes a model.

        Args:
            tuning: Has the model and the data, changes tensors so that all can be undone, and takes note of
                what was done and what was not.
        """
