"""The built-in plugin: what quantpatch itself offers by the public hooks, from layers to tuning methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quantpatch.calibrators import BUILTIN_CALIBRATORS, Calibrator
from quantpatch.numerics.formats import BUILTIN_FORMATS, NumberFormat
from quantpatch.plugins.entry import Entry
from quantpatch.plugins.example import Example
from quantpatch.plugins.hookspecs import API_VERSION, hookimpl
from quantpatch.plugins.runtime import Runtime
from quantpatch.recipes.builtin import BUILTIN_RECIPES
from quantpatch.recipes.descriptor import Recipe

#: Versions of the plugin API it works with, oldest and newest.
quantpatch_api = (API_VERSION, API_VERSION)

# A file of quantpatch.layers each, and the classes of torch.nn that it has quantized versions of.
FAMILIES = {
    "linear": ("Linear", "Bilinear", "LazyLinear"),
    "conv": (
        *(f"Conv{n}d" for n in (1, 2, 3)),
        *(f"ConvTranspose{n}d" for n in (1, 2, 3)),
        *(f"LazyConv{n}d" for n in (1, 2, 3)),
        *(f"LazyConvTranspose{n}d" for n in (1, 2, 3)),
    ),
    "recurrent": ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"),
    "attention": ("MultiheadAttention", "TransformerEncoder"),
    "pooling": tuple(
        f"{kind}{n}d"
        for kind in ("AvgPool", "AdaptiveAvgPool", "MaxPool", "AdaptiveMaxPool")
        for n in (1, 2, 3)
    ),
    "norm": tuple(f"InstanceNorm{n}d" for n in (1, 2, 3)),
    "embedding": ("Embedding", "EmbeddingBag"),
}

# Modules of quantpatch's own, for operations that no layer of torch owns.
OPERATIONS = ("Add", "Cat", "MatMul", "Mul", "ScaledDotProductAttention")

# Methods of quantpatch.tuning, a file each, and their classes.
TUNERS = {
    "adaround": "AdaRound",
    "awq": "AWQ",
    "equalize": "Equalize",
    "smoothquant": "SmoothQuant",
    "bias_correction": "BiasCorrection",
    "gptq": "GPTQ",
    "rotate": "Rotate",
}

# Max pooling picks a value that is quantized already in most networks, and embedding tables are often
# kept in full precision: both are there for those who ask.
ON_REQUEST = frozenset(
    name
    for family in ("pooling", "embedding")
    for name in FAMILIES[family]
    if "Max" in name or family == "embedding"
)

RUNTIMES = {
    "onnxruntime": Runtime(
        placement=("slow_float", "convolutions", "joins"),
        signed_as_uint8=True,
        passes="quantpatch.export.onnx.fast_kernels:for_onnxruntime",
        opens="quantpatch.export.onnx.sessions:open_file",
        kernels="quantpatch.export.onnx.optimized_check:kernels",
    ),
    "tensorrt": Runtime(
        fold_batchnorm=False,  # it does that itself, and its documentation asks not to do it before
        placement="skips",
        unsigned=False,
        zero_points=False,
        transposed_axis=0,
        weight_pairs=True,
        refuses="quantpatch.export.onnx.tensorrt:why_refused",
    ),
    "openvino": Runtime(
        placement="skips",  # it fuses the addition, and what quantizes the sum next
        why_float="quantpatch.export.onnx.openvino:why_float",
        refuses="quantpatch.export.onnx.openvino:why_refused",
        passes="quantpatch.export.onnx.fast_kernels:split_constants",
        opens="quantpatch.export.onnx.openvino_file:open_file",
        kernels="quantpatch.export.onnx.openvino_file:kernels",
    ),
    "inductor": Runtime(
        # A kernel adds one operand in integers, and fuses what follows with its result.
        placement=("skips", "sums", "products"),
        signed_as_uint8=True,
        file="program",
        why_float="quantpatch.export.program.kernels:why_float",
    ),
}


@hookimpl
def quantpatch_entries() -> Iterable[Entry]:
    """One entry for each class in ``FAMILIES`` and ``OPERATIONS``."""
    layers = [
        Entry("torch.nn", name, f"quantpatch.layers.{family}:Quant{name}", default=name not in ON_REQUEST)
        for family, names in FAMILIES.items()
        for name in names
    ]
    module = "quantpatch.layers.operand_modules"
    return layers + [Entry(module, name, f"{module}:Quant{name}") for name in OPERATIONS]


@hookimpl
def quantpatch_examples() -> Iterable[Example]:
    """The examples of ``quantpatch.layers.builtin_examples``: one for each class."""
    from quantpatch.layers.builtin_examples import EXAMPLES  # for tests only

    return EXAMPLES


@hookimpl
def quantpatch_recipes() -> Mapping[str, Recipe]:
    """The recipes of ``quantpatch.recipes``."""
    return BUILTIN_RECIPES


@hookimpl
def quantpatch_formats() -> Mapping[str, NumberFormat]:
    """The formats of ``quantpatch.numerics.formats``."""
    return BUILTIN_FORMATS


@hookimpl
def quantpatch_calibrators() -> Mapping[str, type[Calibrator]]:
    """The calibrators of ``quantpatch.calibrators``."""
    return BUILTIN_CALIBRATORS


@hookimpl
def quantpatch_runtimes() -> Mapping[str, Runtime]:
    """ONNX Runtime, TensorRT and PyTorch's own compiler."""
    return RUNTIMES


@hookimpl
def quantpatch_tuners() -> Mapping[str, str]:
    """The methods of ``quantpatch.tuning``, a file each; imported when they are asked for."""
    return {name: f"quantpatch.tuning.{name}:{cls}" for name, cls in TUNERS.items()}
