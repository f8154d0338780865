"""The ranks of ``torch.distributed`` talking to each other, so that where one fails all of them raise.

A rank that raises while the others wait for it in a collective would leave them there until the process
group gives up, half an hour by default, and then with a message that says nothing of the cause. So every step
begins with a word from each rank on whether it failed; one that did says so in the step that the others come
to next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quantpatch.errors import CalibrationError


class Ranks:
    """A stretch of work that the ranks of a group do together; used in a ``with`` block.

    If the block raises on one rank, the others raise a ``CalibrationError`` that names it at their next step,
    or at the end of the block. Without ``torch.distributed`` there is one rank, which is alone.

    Args:
        group: The process group; None for the default one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.count = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        self._over = False  # every rank knows that it is

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What is not an Exception is a wish to stop at once; the others find this rank gone.
        if self._over or (error is not None and not isinstance(error, Exception)):
            return
        if error is None:
            self._step()
            return
        with contextlib.suppress(CalibrationError):
            self._step(error)

    def gather(self, value: Any) -> list[Any]:
        """A value from each rank, in their order.

        Args:
            value: This rank's; it is pickled.

        Raises:
            CalibrationError: Another rank failed or is gone.
        """
        self._step()
        return self._gather(value)

    def reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """A tensor reduced over the ranks; the argument is left alone.

        Args:
            tensor: This rank's, of one shape and dtype on all.
            op: Such as ``ReduceOp.SUM``.

        Raises:
            CalibrationError: Another rank failed or is gone.
        """
        self._step()
        return self._reduce(tensor, op)

    def number(self, index: int) -> int:
        """The rank, among all there are, of one of the group by its place in the group."""
        return index if self.group is None else dist.get_global_rank(self.group, index)

    def all_raise(self, error: Exception) -> Exception:
        """Marks an error as one that every rank raises of itself; to be raised by the caller."""
        self._over = True
        return error

    def _step(self, failure: Exception | None = None) -> None:
        if self.count == 1:
            return
        failed = torch.tensor(int(failure is not None), dtype=torch.int32)
        if not self._reduce(failed, dist.ReduceOp.MAX):
            return
        gathered = self._gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        by_rank = {self.number(i): message for i, message in enumerate(gathered) if message is not None}
        messages = "; ".join(f"rank {rank} failed: {message}" for rank, message in by_rank.items())
        raise self.all_raise(
            CalibrationError(f"{messages}. No range was set on any rank", ranks=tuple(by_rank))
        )

    def _gather(self, value: Any) -> list[Any]:
        values = [value] * self.count
        if self.count > 1:
            with self._noticing():
                dist.all_gather_object(values, value, group=self.group)
        return values

    def _reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        # NCCL takes CUDA tensors only; the statistics of a layer that runs on the CPU are not.
        nccl = self.count > 1 and dist.get_backend(self.group) == dist.Backend.NCCL
        result = tensor.to("cuda" if nccl and not tensor.is_cuda else tensor.device, copy=True)
        if self.count > 1:
            with self._noticing():
                dist.all_reduce(result, op=op, group=self.group)
        return result.to(tensor.device)

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # which the errors of torch.distributed are
            raise self.all_raise(
                CalibrationError(
                    f"another rank is gone, or does something else, so no range was set: {error}. Every rank "
                    f"has to calibrate, with the same model"
                )
            ) from error
