"""``make zoo``: the smallest model of every family of timm, built in a block, prepared, calibrated.

Weights are random, and so are the statistics of batch norms, so that a wrong fold shows. Of each model:

- what is built in a block with ``operations="products"`` takes the float twin's ``state_dict`` strictly,
- it computes in float what the float twin computes, to the bit, also after pickling, and again once reverted,
- prepared for ONNX Runtime it computes in float what the float twin computes,
- it is calibrated without an error, and its output compared with the float twin's.

The shares are those of multiplications on quantized operands, as they come out of a block without operations
and with them.

Any exception, and a difference of more than 1e-5 in float, is a failure.
"""

from __future__ import annotations

import argparse
import copy
import gc
import pickle
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.layers.quantizer import in_float

# What float models may differ by, relative to the size of the output, since folding rounds once more. Where a
# model with random weights makes more of a rounding, it is compared in float64.
EXACT = 1e-5
# Sizes of images to try before that which a model was made for.
_SIZES = (64, 112, 128, 224, 256)
# Smaller images are a single place deep inside, which a norm makes zeros of: nothing to calibrate on.
_LEAST = {"csatv2": 256}

# The smallest by number of parameters, in timm 1.0.31; of other families it is looked for, in a while.
_SMALLEST = """
beit:beit_base_patch16_224 byoanet:halonet_h1 byobnet:test_byobnet cait:cait_xxs24_224 coat:coat_tiny
convit:convit_tiny convmixer:convmixer_768_32 convnext:test_convnext cpubone:cpubone_nano
crossvit:crossvit_tiny_240 csatv2:csatv2 cspnet:cs3darknet_focus_s cspnext:cspnext_tiny davit:davit_tiny
deepseek_vit:deepseek_vit_412m deit:deit_tiny_patch16_224 densenet:densenet121 dla:dla46x_c dpn:dpn48b
edgenext:edgenext_xx_small efficientformer:efficientformer_l1 efficientformer_v2:efficientformerv2_s0
efficientnet:test_efficientnet efficientvim:efficientvim_m1 efficientvit_mit:efficientvit_b0
efficientvit_msra:efficientvit_m0 eva:vit_tiny_patch16_dinov3_qkvb fasternet:fasternet_t0
fastvit:fastvit_t8 focalnet:focalnet_tiny_srf gcvit:gcvit_xxtiny gemma4_vit:gemma4_vit_167m
ghostnet:ghostnet_050 hardcorenas:hardcorenas_b hgnet:hgnetv2_b0 hiera:hiera_tiny_224
hieradet_sam2:sam2_hiera_tiny hrnet:hrnet_w18_small iformer:iformer_t inception_next:inception_next_atto
inception_resnet_v2:inception_resnet_v2 inception_v3:inception_v3 inception_v4:inception_v4
lcnetv2:lcnetv2_small levit:levit_128s lowformer:lowformer_b0 mambaout:test_mambaout
maxxvit:test_coatnet metaformer:poolformerv2_s12 mlp_mixer:gmlp_ti16_224
mobilenetv3:mobilenetv3_small_050 mobilenetv5:mobilenetv5_base mobilevit:mobilevit_xxs
mvitv2:mvitv2_tiny naflexvit:naflexvit_base_patch16_parfac_gap nasnet:nasnetalarge nest:nest_tiny
nextvit:nextvit_small nfnet:test_nfnet pit:pit_ti_224 pnasnet:pnasnet5large pvt_v2:pvt_v2_b0
qwen3_vit:qwen3_vit_88m rdnet:rdnet_tiny regnet:regnetx_002 repghost:repghostnet_050 repvit:repvit_m1
res2net:res2next50 resnest:resnest14d resnet:test_resnet resnetv2:resnetv2_18 rexnet:rexnet_100
selecsls:selecsls42 senet:legacy_seresnet18 sequencer:sequencer2d_s shvit:shvit_s1 sknet:skresnet18
starnet:starnet_s050 swiftformer:swiftformer_xs swin_transformer:swin_tiny_patch4_window7_224
swin_transformer_v2:swinv2_tiny_window8_256 swin_transformer_v2_cr:swinv2_cr_tiny_224
tiny_vit:tiny_vit_5m_224 tnt:tnt_s_legacy_patch16_224 tresnet:tresnet_m twins:twins_svt_small vgg:vgg11
visformer:visformer_tiny vision_transformer:test_vit vision_transformer_hybrid:vit_tiny_r_s16_p8_224
vision_transformer_relpos:test_vit_relpos vision_transformer_sam:samvit_base_patch16_224
vitamin:vitamin_small_224 volo:volo_d1_224 vovnet:ese_vovnet19b_slim_dw xception:legacy_xception
xception_aligned:xception41p xcit:xcit_nano_12_p8_224
"""


@attrs.define
class Row:
    """What came of a model."""

    family: str
    model: str
    size: int = 0
    share: float | None = None
    with_operations: float | None = None
    exact: float | None = None
    rounded: float | None = None
    error: float | None = None
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether something did not work."""
        return bool(self.failure) or self.exact is None or not self.exact <= EXACT


def _timm() -> Any:
    """Timm, though torchvision, which it imports, may be built for another torch than the one that is here.

    What torchvision registers with torch about operators in its binary part needs that to be loaded.
    """
    register = torch.library.register_fake

    def if_it_exists(operator: Any, function: Any = None, /, **options: Any) -> Any:
        def registered(function: Any) -> Any:
            try:
                return register(operator, function, **options)
            except RuntimeError:
                return function

        return registered if function is None else registered(function)

    with mock.patch.object(torch.library, "register_fake", if_it_exists):
        import timm
    return timm


def _smallest(timm: Any, family: str) -> str:
    """The model of a family with the fewest parameters."""
    names = timm.list_models(module=family)
    known = dict(pair.split(":") for pair in _SMALLEST.split()).get(family)
    if known is not None and known in names:
        return known
    counts: dict[str, int] = {}
    for name in names:
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
    return min(counts, key=lambda name: counts[name])


def _lively(model: nn.Module) -> nn.Module:
    """A model whose batch norms and zeros are not those of a new one."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.normal_(module.bias, 0, 0.3)
    for parameter in model.parameters():
        if (parameter.dim() > 1 or parameter.numel() == 1) and not parameter.any():
            nn.init.normal_(parameter, 0, 0.1)  # branches that begin as nothing give nothing to calibrate on
    return model.eval()


def _tensor(output: Any) -> Tensor:
    """The first tensor of an output."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def _small(timm: Any, row: Row) -> tuple[dict[str, int], nn.Module, Tensor, Tensor]:
    """A model with the smallest images that it takes: how to build it, it, its input and its output."""
    with torch.device("meta"):
        settings: Any = timm.create_model(row.model, pretrained=False).pretrained_cfg
    native: int = settings["input_size"][-1]
    fixed = settings.get("fixed_input_size")
    for row.size in (*(size for size in _SIZES if _LEAST.get(row.model, 0) <= size < native), native):
        options = {"img_size": row.size} if fixed and row.size != native else {}
        try:
            if options:
                with torch.device("meta"):
                    timm.create_model(row.model, pretrained=False, **options)
            torch.manual_seed(0)
            model = _lively(timm.create_model(row.model, pretrained=False, **options))
            x = torch.randn(1, 3, row.size, row.size)
            with torch.no_grad():
                return options, model, x, _tensor(model(x))
        except Exception:
            if row.size == native:
                raise
    raise AssertionError


def _off(now: Tensor, before: Tensor) -> float:
    return float((now - before).double().norm() / before.double().norm())


def measure(timm: Any, family: str) -> Row:
    """Does all that to a family's smallest model."""
    row = Row(family, _smallest(timm, family))
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", qp.QuantPatchWarning)
            _measure(timm, row)
        row.notes = tuple(str(w.message) for w in caught if issubclass(w.category, qp.QuantPatchWarning))
    except Exception as error:
        row.failure = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    row.seconds = time.perf_counter() - start
    return row


def _measure(timm: Any, row: Row) -> None:
    options, model, x, expected = _small(timm, row)
    row.share = qp.audit(_built(timm, row, options, model, operations=()), x).share
    quantized = _built(timm, row, options, model)
    row.with_operations = qp.audit(quantized, x).share
    for twin in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        with in_float(twin), torch.no_grad():
            if not torch.equal(_tensor(twin(x)), expected):
                raise AssertionError("with quantizers off it does not compute what the float model does")
    qp.revert(twin)
    with torch.no_grad():
        if not torch.equal(_tensor(twin(x)), expected):
            raise AssertionError("reverted it is not the float model")
    del twin
    report = qp.prepare(quantized, x, runtime="onnxruntime")
    row.skipped = tuple(
        f"{name}: {why}" for name, why in {**report.batchnorm.skipped, **report.skipped}.items()
    )
    with torch.no_grad():
        with in_float(quantized):
            row.exact = _off(_tensor(quantized(x)), expected)
        qp.calibrate(quantized, [x], progress=False)
        row.error = _off(_tensor(quantized(x)), expected)
    if row.exact > EXACT:
        del quantized
        row.rounded, row.exact = row.exact, _exact(timm, row, options, model.double(), x.double())


def _built(
    timm: Any, row: Row, options: dict[str, int], twin: nn.Module, operations: Any = "products"
) -> nn.Module:
    """The model, built in a block, with the weights of its float twin."""
    with qp.quantize_modules(operations=operations):
        quantized: nn.Module = timm.create_model(row.model, pretrained=False, **options).eval()
    quantized.to(next(twin.parameters()).dtype).load_state_dict(twin.state_dict(), strict=True)
    return quantized


@torch.no_grad()
def _exact(timm: Any, row: Row, options: dict[str, int], model: nn.Module, x: Tensor) -> float:
    """How far off a prepared model is in float64."""
    quantized = _built(timm, row, options, model)
    qp.prepare(quantized, x, runtime="onnxruntime")
    with in_float(quantized):
        return _off(_tensor(quantized(x)), _tensor(model(x)))


def table_of(rows: list[Row]) -> Table:
    """A line for each family."""
    table = Table(title=f"{len(rows)} families of timm: the smallest model of each, random weights")
    for heading in ("family", "model"):
        table.add_column(heading, overflow="fold")
    for heading in (
        "pixels",
        "MACs quantized",
        "with operations",
        "float: off by",
        "calibrated: off by",
        "left",
        "s",
    ):
        table.add_column(heading, justify="right")
    table.add_column("notes", overflow="fold", ratio=1)
    for row in rows:
        notes = row.failure or "; ".join(note if len(note) < 160 else f"{note[:160]} …" for note in row.notes)
        table.add_row(
            row.family,
            row.model,
            str(row.size),
            "-" if row.share is None else f"{row.share:.1%}",
            "-" if row.with_operations is None else f"{row.with_operations:.2%}",
            "-" if row.exact is None else f"{row.exact:.1e}{' (*)' * (row.rounded is not None)}",
            "-" if row.error is None else f"{row.error:.3f}",
            str(len(row.skipped)),
            f"{row.seconds:.0f}",
            notes,
            style="red" if row.failed else None,
        )
    return table


def main() -> None:
    """Measures the families asked for (default: all), and exits with 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("families", nargs="*", help="such as resnet; default: every one")
    parser.add_argument("--details", type=Path, help="a file for all that was left and noted")
    options = parser.parse_args()
    timm = _timm()
    rows = []
    for family in track(options.families or timm.list_modules(), console=Console(stderr=True)):
        rows.append(measure(timm, family))
        gc.collect()
        if options.details is not None:
            with options.details.open("a") as file:
                print(rows[-1], file=file)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table_of(rows))
    failed = [row.family for row in rows if row.failed]
    shares = [(row.family, row.with_operations) for row in rows if row.with_operations is not None]
    below = [f"{family} {share:.2%}" for family, share in shares if share < 0.995]
    exact = [row.exact for row in rows if row.exact is not None]
    rounded = [f"{row.family} {row.rounded:.1e}" for row in rows if row.rounded is not None]
    if rounded:
        console.print(f"(*) in float64; in float32, of which these models make more: {', '.join(rounded)}")
    console.print(f"below 99.5 % quantized with operations ({len(below)}): {', '.join(below) or 'none'}")
    console.print(
        f"{len(rows) - len(failed)} of {len(rows)} families hold; in float off by at most "
        f"{max(exact, default=0):.1e}{'; failed: ' + ', '.join(failed) if failed else ''}"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
