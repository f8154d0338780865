"""What functions that evaluate a model many times share: results kept in a file, and changes noticed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantpatch.errors import ArgumentTypeError, FileError, listed, shown, warn_caller
from quantpatch.torch_tools.atomic_files import written_whole


def demand_evaluate(evaluate: Any, example: str) -> None:
    """Checks what is to evaluate a model.

    Args:
        evaluate: What was given.
        example: A call that is right.

    Raises:
        ArgumentTypeError: It is not a function.
    """
    if not callable(evaluate):
        raise ArgumentTypeError(
            f"evaluate is a {type(evaluate).__name__}, expected a function that gets the model and returns a "
            f"metric: {example}",
            evaluate=evaluate,
        )


def as_number(metric: Any) -> float:
    """A metric as a number.

    Raises:
        ArgumentTypeError: It is something else.
    """
    if isinstance(metric, Tensor):
        metric = metric.detach()
    try:
        return float(metric)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f" of shape {tuple(metric.shape)}" if isinstance(metric, Tensor) else ""
        raise ArgumentTypeError(
            f"evaluate returned a {type(metric).__name__}{shape}, expected one number, such as an accuracy",
            evaluate=metric,
        ) from error


class Changes:
    """What ``evaluate`` does to a model's weights and buffers, which should be nothing."""

    def __init__(self, model: nn.Module) -> None:
        self._model = type(model).__name__
        state = model.state_dict(keep_vars=True).items()
        self._tensors = {k: t for k, t in state if isinstance(t, Tensor) and not t.is_inference()}
        self._versions = [tensor._version for tensor in self._tensors.values()]

    def begin(self) -> None:
        """Takes what tensors are now for what they were: another than ``evaluate`` has written to them."""
        self._versions = [tensor._version for tensor in self._tensors.values()]

    def warn(self) -> None:
        """Warns of what was written to, once for each tensor."""
        versions = [tensor._version for tensor in self._tensors.values()]
        if versions == self._versions:
            return
        pairs = zip(self._tensors, self._versions, versions, strict=True)
        changed = [name for name, before, after in pairs if before != after]
        self._tensors = {name: t for name, t in self._tensors.items() if name not in changed}
        self._versions = [tensor._version for tensor in self._tensors.values()]
        warn_caller(
            f"evaluate changed {listed(changed, 4)} of {self._model}, so each "
            f"layer is measured in another model. Leave the model in eval mode, in which evaluate gets it, "
            f"and train a copy"
        )


def number_of(value: Any) -> float:
    """A number from a file.

    Raises:
        ValueError: It is NaN, a text or a truth value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{value!r} is not a result")
    return float(value)


class Results(dict[str, Any]):
    """Results by key, kept in a file if there is one; the file is replaced whole each time.

    Args:
        path: The file, or None.
        function: Name of the function whose results they are.
        header: What has to be the same in the file. ``"model"`` is a ``fingerprint``.
        read: Makes a result of what the file has; raises ``ValueError`` if it is none.

    Raises:
        FileError: It is a file of something else, or of results for another header.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        function: str,
        header: Mapping[str, str],
        read: Callable[[Any], Any] = number_of,
    ) -> None:
        super().__init__()
        self._path = None if path is None else Path(path)
        self._header = dict(header)
        if self._path is None or not self._path.exists():
            return
        try:
            data = json.loads(self._path.read_text())
            found = {key: data[key] for key in header}
            self.update((str(key), read(value)) for key, value in data["results"].items())
        except IsADirectoryError:
            raise FileError(
                f"resume={str(self._path)!r} is a folder: name a file in it", path=str(self._path)
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise FileError(
                f"{self._path} holds no results of {function}: {type(error).__name__}: {shown(error)}",
                path=str(self._path),
            ) from error
        for key, value in header.items():
            if found[key] != value and key != "model":
                raise FileError(
                    f"{self._path} holds results of {key} {shown(repr(found[key]))}, not {value!r}",
                    path=str(self._path),
                )
        if found["model"] != header["model"]:
            raise FileError(
                f"{self._path} holds results of another model, or of other weights, ranges or settings; "
                f"delete it to measure again",
                path=str(self._path),
            )

    def put(self, key: str, value: Any) -> None:
        """Keeps a result, in the file too."""
        self[key] = value
        if self._path is None:
            return
        with written_whole(self._path) as folder:
            text = json.dumps({**self._header, "results": self})
            (folder / self._path.name).write_text(text)
