"""What gives a layer its quantizers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from pytorch_quantization.nn.modules.tensor_quantizer import TensorQuantizer
from pytorch_quantization.tensor_quant import QUANT_DESC_8BIT_PER_TENSOR, QuantDescriptor
from quantpatch import QuantizedLayer

__all__ = [
    "QuantInputLayer",
    "QuantInputMixin",
    "QuantLayer",
    "QuantMixin",
    "pop_quant_desc_in_kwargs",
]


def _checked(descriptor: Any) -> QuantDescriptor:
    if not isinstance(descriptor, QuantDescriptor):
        raise ValueError(f"{descriptor!r} is not a QuantDescriptor")
    return descriptor


def _for_layer(descriptor: QuantDescriptor) -> QuantDescriptor:
    if not _checked(descriptor).fake_quant:
        raise ValueError(
            f"Only fake quantization is supported in layers, and the descriptor {descriptor} has "
            f"fake_quant=False"
        )
    return descriptor


class _WithInput:
    """The part about the input."""

    default_quant_desc_input: ClassVar[QuantDescriptor] = QUANT_DESC_8BIT_PER_TENSOR
    _input_quantizer: TensorQuantizer

    @classmethod
    def set_default_quant_desc_input(cls, value: QuantDescriptor) -> None:
        """Sets the descriptor of inputs of layers of this class that are built from now on."""
        cls.default_quant_desc_input = copy.deepcopy(_checked(value))

    @property
    def input_quantizer(self) -> TensorQuantizer:
        """The quantizer of the input."""
        return self._input_quantizer


class QuantInputMixin(_WithInput):
    """For layers of which only the input is quantized. For classes of your own, too."""

    def init_quantizer(self, quant_desc_input: QuantDescriptor) -> None:
        """Makes the quantizer.

        Raises:
            ValueError: The descriptor has ``fake_quant=False``.
        """
        self._input_quantizer = TensorQuantizer(_for_layer(quant_desc_input))


class QuantMixin(_WithInput):
    """For layers of which input and weight are quantized. For classes of your own, too."""

    default_quant_desc_weight: ClassVar[QuantDescriptor] = QUANT_DESC_8BIT_PER_TENSOR
    _weight_quantizer: TensorQuantizer
    _input_quantizers: nn.ModuleList
    _weight_quantizers: nn.ModuleList

    @classmethod
    def set_default_quant_desc_weight(cls, value: QuantDescriptor) -> None:
        """Sets the descriptor of weights of layers of this class that are built from now on."""
        cls.default_quant_desc_weight = copy.deepcopy(_checked(value))

    @property
    def weight_quantizer(self) -> TensorQuantizer:
        """The quantizer of the weight."""
        return self._weight_quantizer

    def init_quantizer(
        self,
        quant_desc_input: QuantDescriptor,
        quant_desc_weight: QuantDescriptor,
        num_layers: int | None = None,
    ) -> None:
        """Makes the quantizers: one of each, or ``num_layers`` of each in two lists.

        Raises:
            ValueError: A descriptor has ``fake_quant=False``.
        """
        descriptors = {"input": _for_layer(quant_desc_input), "weight": _for_layer(quant_desc_weight)}
        for name, descriptor in descriptors.items():
            if num_layers is None:
                setattr(self, f"_{name}_quantizer", TensorQuantizer(descriptor))
            else:
                several = nn.ModuleList(TensorQuantizer(descriptor) for _ in range(num_layers))
                setattr(self, f"_{name}_quantizers", several)


def pop_quant_desc_in_kwargs(quant_cls: Any, input_only: bool = False, **kwargs: Any) -> Any:
    """The descriptors among the keywords of a layer, or the defaults of its class.

    Args:
        quant_cls: The class of the layer.
        input_only: Whether it quantizes its input alone.
        **kwargs: Its keywords, without those of the float class.

    Returns:
        The descriptor of the input; without ``input_only`` a pair with that of the weight.

    Raises:
        TypeError: There are other keywords.
    """
    quant_desc_input = kwargs.pop("quant_desc_input", None) or quant_cls.default_quant_desc_input
    quant_desc_weight = None
    if not input_only:
        quant_desc_weight = kwargs.pop("quant_desc_weight", None) or quant_cls.default_quant_desc_weight
    if kwargs:
        raise TypeError(f"Unused keys: {', '.join(kwargs)}")
    return quant_desc_input if input_only else (quant_desc_input, quant_desc_weight)


class _Layer(QuantizedLayer):
    """``QuantizedLayer`` with the toolkit's names: quantizers from descriptors instead of a recipe."""

    _torch_keywords: ClassVar[frozenset[str]] = frozenset()
    _input_only: ClassVar[bool] = False
    init_quantizer: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inits = (vars(base).get("__init__") for base in cls.__mro__ if not issubclass(base, QuantizedLayer))
        cls._torch_keywords = frozenset(
            name for init in inits if inspect.isfunction(init) for name in inspect.signature(init).parameters
        ) - {"self", "args", "kwargs"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in list(kwargs) if name not in self._torch_keywords}
        found = pop_quant_desc_in_kwargs(type(self), self._input_only, **own)
        descriptors = (found,) if self._input_only else found
        for descriptor in descriptors:
            _for_layer(descriptor)
        super().__init__(*args, **kwargs)
        self._init_quantizers(*descriptors)

    def _init_quantizers(self, *descriptors: QuantDescriptor) -> None:
        self.init_quantizer(*descriptors)

    def descriptors(self, recipe: Any) -> Iterable[Any]:
        """None: quantpatch's recipes do not concern these layers."""
        return ()

    def quantizer(self, operand: str) -> Any:
        """The quantizer of an operand, or None."""
        modules: dict[str, Any] = self._modules  # type: ignore[attr-defined]
        return modules.get(f"_{operand}_quantizer")


class QuantInputLayer(QuantInputMixin, _Layer):
    """A layer of torch with quantized input; name it before the float class."""

    weights: ClassVar[Mapping[str, int | None]] = {}
    _input_only = True


class QuantLayer(QuantMixin, _Layer):
    """A layer of torch with quantized input and ``weight``; name it before the float class."""

    weight: Tensor

    def quantize_weights(self) -> dict[str, Any]:
        """The weight, if its quantizer changes it."""
        weight = self.weight
        quantized = self._weight_quantizer(weight)
        return {} if quantized is weight else {"weight": quantized}
