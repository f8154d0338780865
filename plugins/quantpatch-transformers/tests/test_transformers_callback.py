"""The Trainer's callback: a real Trainer on a small data set."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import MODELS
from torch.utils.data import Dataset, IterableDataset

import quantpatch as qp
from quantpatch.errors import CalibrationError, ConversionError, QuantPatchWarning
from quantpatch_transformers import QuantPatchCallback

# accelerate and the Trainer warn of what a CPU does not have.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory", "ignore:.*accelerate", "ignore:.*no accelerator"
)


class Sentences(Dataset):
    """Rows of tokens, and a record of which were asked for."""

    def __init__(self, count=24):
        self.rows = torch.randint(0, 99, (count, 8), generator=torch.Generator().manual_seed(0))
        self.asked = []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.asked.append(int(index))
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Stream(IterableDataset):
    def __iter__(self):
        for row in Sentences().rows:
            yield {"input_ids": row, "labels": row}


def quantized(recipe=None):
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe):
        return MODELS["gpt2"].build()


def trainer_of(model, callback, path, data=None, **options):
    args = transformers.TrainingArguments(
        output_dir=str(path),
        max_steps=options.pop("max_steps", 3),
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", **options},
    )
    callbacks = [] if callback is None else [callback]
    return transformers.Trainer(model, args, train_dataset=data or Sentences(), callbacks=callbacks)


def quantizers(model):
    return [m for m in model.modules() if isinstance(m, qp.TensorQuantizer)]


def ranges(model):
    state = model.state_dict()
    return {k: v.clone() for k, v in state.items() if k.endswith("_amax") and not v.isnan().any()}


def test_it_calibrates_on_the_training_data_and_says_what_runs_quantized(tmp_path, capsys):
    model, callback = quantized(), QuantPatchCallback(calibrate=2)
    trainer = trainer_of(model, callback, tmp_path)
    trainer.train()
    assert {quantizer.state for quantizer in quantizers(model)} == {"calibrated"}
    assert callback.coverage.share > 0.94
    (entry,) = [entry for entry in trainer.state.log_history if "quantized_share" in entry]
    assert entry == {"quantized_share": callback.coverage.share, "step": 0}
    told = capsys.readouterr().out
    assert (
        f"{callback.coverage.share:.1%} of the multiply-accumulates of GPT2LMHeadModel run quantized" in told
    )
    assert "float: transformer.h.0.attn (attention scores): " in told


def test_the_ranges_are_those_of_calibrating_on_the_same_batches(tmp_path):
    data = Sentences()
    model = quantized()
    trainer_of(model, QuantPatchCallback(2, "mse", report=False), tmp_path, data, learning_rate=0.0).train()
    drawn = torch.tensor(data.asked[:8])
    assert len(set(drawn.tolist())) == 8
    by_hand = quantized()
    qp.calibrate(by_hand, list(data.rows[drawn].split(4)), method="mse", progress=False)
    mine, theirs = ranges(model), ranges(by_hand)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_training_sees_its_data_in_the_same_order(tmp_path):
    with_it, without = Sentences(), Sentences()
    trainer_of(quantized(), QuantPatchCallback(2, report=False), tmp_path, with_it).train()
    trainer_of(quantized(), None, tmp_path, without).train()
    assert with_it.asked[8:] == without.asked


def test_ranges_that_are_known_stay_and_the_others_are_found(tmp_path):
    model = quantized()
    qp.calibrate(model, [{"input_ids": torch.randint(0, 99, (1, 2))}], progress=False)
    qp.configure(model, {"lm_head": "int4"})
    before = ranges(model)
    trainer_of(model, QuantPatchCallback(2, report=False), tmp_path, learning_rate=0.0).train()
    after = ranges(model)
    assert {key for key in after if key not in before} == {
        f"lm_head.{operand}_quantizer._amax" for operand in ("input", "weight")
    }
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_stream_of_data_will_do(tmp_path):
    model = quantized()
    trainer_of(model, QuantPatchCallback(2), tmp_path, Stream()).train()
    assert {quantizer.state for quantizer in quantizers(model)} == {"calibrated"}


def test_options_reach_the_calibrators(tmp_path):
    callback = QuantPatchCallback(1, "percentile", report=False, percentil=99.0)
    with pytest.raises(CalibrationError, match="no option 'percentil'"):
        trainer_of(quantized(), callback, tmp_path).train()


def test_without_calibration_it_warns_of_quantizers_that_have_no_range(tmp_path):
    callback = QuantPatchCallback(calibrate=0, report=False)
    trainer = trainer_of(quantized(), callback, tmp_path)
    with pytest.warns(
        QuantPatchWarning, match="18 quantizers are not calibrated.*transformer.h.0.attn.c_attn"
    ):
        trainer.train()


def test_a_quantizer_that_saw_no_data_is_named_and_with_strict_an_error(tmp_path):
    def model():
        made = quantized()
        with qp.quantize_modules():
            made.spare = torch.nn.Linear(2, 2)
        return made

    trainer = trainer_of(model(), QuantPatchCallback(1, report=False), tmp_path)
    with pytest.warns(QuantPatchWarning, match="saw no data.*spare.input_quantizer"):
        trainer.train()
    with pytest.raises(CalibrationError, match="spare.input_quantizer"):
        trainer_of(model(), QuantPatchCallback(1, report=False, strict=True), tmp_path).train()


def test_checkpoints_of_the_training_are_complete_and_it_resumes_from_them(tmp_path):
    model = quantized()
    trainer_of(
        model, QuantPatchCallback(2, report=False), tmp_path, save_strategy="steps", save_steps=2
    ).train()
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(value, ranges(model)[key]) for key, value in ranges(again).items())
    assert len(ranges(again)) == 18
    resumed = quantized()
    data = Sentences()
    callback = QuantPatchCallback(2, report=False)
    trainer_of(resumed, callback, tmp_path, data, max_steps=3).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    mine = resumed.state_dict()
    assert all(torch.equal(mine[key], value) for key, value in model.state_dict().items())
    assert len(data.asked) < 12 + 8  # nothing was drawn for another calibration


def test_known_ranges_are_overwritten_where_that_is_asked_for(tmp_path):
    model = quantized()
    for quantizer in quantizers(model):
        quantizer.amax = 1e6 if quantizer.descriptor.kept_axes is None else None
    trainer_of(model, QuantPatchCallback(1, report=False, existing="overwrite"), tmp_path).train()
    assert max(float(value.max()) for value in ranges(model).values()) < 1e6


@pytest.mark.parametrize("known_before", [True, False])
def test_learned_ranges_train_whenever_they_are_calibrated(tmp_path, known_before):
    model = quantized(qp.Recipe(name="learned", input=qp.QuantDescriptor(learn_amax=True)))
    if known_before:
        qp.calibrate(model, [MODELS["gpt2"].inputs], progress=False)
    trainer = trainer_of(model, QuantPatchCallback(1), tmp_path, learning_rate=0.1)
    found = {}

    class Watching(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            found.update({key: value for key, value in ranges(model).items() if key not in found})

    trainer.add_callback(Watching())
    trainer.train()
    moved = [key for key, value in ranges(model).items() if not torch.equal(value, found[key])]
    assert len([key for key in moved if key.endswith("input_quantizer._amax")]) == len(moved) == 9


def test_learned_ranges_whose_shape_data_shows_have_to_be_known_before_the_optimizer_is_made(tmp_path):
    model = quantized(qp.Recipe(name="learned", input=qp.QuantDescriptor(axis=-1, learn_amax=True)))
    with pytest.raises(CalibrationError, match="shows only with data.*input_quantizer.*before trainer.train"):
        trainer_of(model, QuantPatchCallback(1), tmp_path).train()
    qp.calibrate(model, [MODELS["gpt2"].inputs], progress=False)
    trainer_of(model, QuantPatchCallback(1), tmp_path).train()


def test_a_float_model_and_a_number_of_batches_that_is_none_are_errors(tmp_path):
    with pytest.raises(ConversionError, match="GPT2LMHeadModel holds no quantizer"):
        trainer_of(MODELS["gpt2"].build(), QuantPatchCallback(), tmp_path)
    for wrong in (-1, True, 2.5):
        with pytest.raises(CalibrationError, match="expected a number of batches"):
            QuantPatchCallback(calibrate=wrong)
