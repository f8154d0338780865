"""A callback of transformers' Trainer that calibrates before training, and reports what runs quantized."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import quantpatch as qp
from quantpatch.analysis import CoverageReport
from quantpatch.errors import CalibrationError, ConversionError, QuantPatchWarning, listed
from quantpatch.layers import TensorQuantizer, named_quantizers
from quantpatch_transformers.pretrained import make_savable

__all__ = ["QuantPatchCallback"]


class QuantPatchCallback(TrainerCallback):
    """Calibrates a quantized model on the training data before training, and reports its coverage.

    ::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[QuantPatchCallback(calibrate=32)])
        trainer.train()

    Ranges that are known already stay, as when training resumes from a checkpoint. The order in which
    training sees its data is the same as without the callback. Checkpoints that the Trainer saves have the
    ranges, and how the model is quantized, for ``from_pretrained``.

    Args:
        calibrate: How many batches to calibrate on, drawn from the training data; 0 to leave it out.
        method: Name of the calibrator, as in ``quantpatch.calibrate``; default: each quantizer's own.
        report: Whether to print the share of multiply-accumulates that run quantized and what does not, and
            to write the share into the Trainer's log as ``quantized_share``.
        existing: What becomes of ranges that are known already, as in ``quantpatch.calibrate``.
        strict: Whether a quantizer that saw no data is an error; otherwise a warning names it.
        **options: Handed to the calibrators, such as ``percentile=99.9``.

    Attributes:
        coverage: The audit's report, once training has begun and if one was asked for.
    """

    def __init__(
        self,
        calibrate: int = 32,
        method: str | None = None,
        report: bool = True,
        *,
        existing: Literal["error", "keep", "overwrite"] = "keep",
        strict: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(calibrate, int) or isinstance(calibrate, bool) or calibrate < 0:
            raise CalibrationError(f"calibrate={calibrate!r}: expected a number of batches, 0 for none")
        self.batches = calibrate
        self.method = method
        self.report = report
        self.existing = existing
        self.strict = strict
        self.options = options
        self.coverage: CoverageReport | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes the checkpoints of the training complete.

        Raises:
            ConversionError: The model is not quantized.
        """
        model = kwargs["model"]
        if not named_quantizers(model):
            raise ConversionError(
                f"{type(model).__name__} holds no quantizer: build or load it inside "
                f"`with quantize_modules():`, or write qp.convert(model), before the Trainer gets it"
            )
        if isinstance(model, PreTrainedModel):
            make_savable(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Calibrates and reports.

        Raises:
            CalibrationError: See ``quantpatch.calibrate``; or ranges are to be learned whose shape only data
                shows, after the Trainer has made its optimizer.
        """
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        unknown = _without_range(model)
        if self.batches and (unknown or self.existing == "overwrite"):
            self._refuse_learned(model, unknown)
            qp.calibrate(
                model,
                self._batches(loader, args),
                method=self.method,
                existing=self.existing,
                strict=self.strict,
                progress=state.is_world_process_zero and not args.disable_tqdm,
                **self.options,
            )
        elif unknown:
            warnings.warn(
                f"{len(unknown)} quantizers are not calibrated and take the range of each tensor: "
                f"{listed(unknown)}. Write "
                f"QuantPatchCallback(calibrate=32), or qp.calibrate(model, batches) before training",
                QuantPatchWarning,
                stacklevel=2,
            )
        if self.report and state.is_world_process_zero:
            self.coverage = qp.audit(model, kwargs=next(self._batches(loader, args)))
            state.log_history.append({"quantized_share": self.coverage.share, "step": state.global_step})
            print(_told(model, self.coverage))

    @staticmethod
    def _refuse_learned(model: nn.Module, unknown: list[str]) -> None:
        quantizers = named_quantizers(model)
        late = (name for name in unknown if quantizers[name].held is None)
        learned = [name for name in late if quantizers[name].descriptor.learn_amax]
        if learned:
            raise CalibrationError(
                f"the shape of these learned ranges shows only with data, so that they become parameters "
                f"when they are calibrated, and the Trainer has made its optimizer without them: "
                f"{listed(learned)}. Write "
                f"qp.calibrate(model, batches) before trainer.train()",
                quantizers=tuple(learned),
            )

    def _batches(self, loader: Any, args: TrainingArguments) -> Iterator[dict[str, Any]]:
        """Batches of the training data, from a loader of their own: the Trainer's is not to be begun."""
        dataset = loader.dataset
        size = args.train_batch_size
        if not isinstance(dataset, IterableDataset):
            generator = torch.Generator().manual_seed(args.seed + args.process_index)
            count = max(1, self.batches) * size
            dataset = Subset(dataset, torch.randperm(len(dataset), generator=generator)[:count].tolist())
        own = DataLoader(dataset, batch_size=size, collate_fn=loader.collate_fn)
        with torch.random.fork_rng(devices=[]):
            for batch in islice(own, max(1, self.batches)):
                yield _moved(dict(batch), args.device)


def _without_range(model: nn.Module) -> list[str]:
    return [
        name
        for name, quantizer in named_quantizers(model).items()
        if not quantizer.disabled and not quantizer.descriptor.dynamic and quantizer.amax is None
    ]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(each, device) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(each, device) for each in value)
    return value


def _told(model: nn.Module, coverage: CoverageReport) -> str:
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    left = sorted((row for row in coverage.rows if not row.quantized), key=lambda row: -row.macs)
    lines = [
        f"quantpatch: {coverage.share:.1%} of the multiply-accumulates of {coverage.model} run "
        f"quantized, by {len(quantizers)} quantizers"
    ]
    if left:
        floats = (f"float: {row.module} ({row.operation}): {row.reason}" for row in left)
        separator = "\n  "
        lines.append(f"  {listed(floats, separator=separator)}")
    return "\n".join(lines)
