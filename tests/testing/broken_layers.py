"""A layer, its good replacement, and one that breaks each rule of the conformance kit."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional as F

from quantpatch import QuantizedLayer


class Scaled(nn.Module):
    """A linear layer with a gain."""

    def __init__(self, in_features: int, out_features: int, *, gain: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.gain = gain

    def forward(self, input):
        return F.linear(input, self.weight) * self.gain


class Good(QuantizedLayer, Scaled):
    """``Scaled`` with quantized input and weight."""


def local() -> type:
    class Local(QuantizedLayer, Scaled):
        pass

    return Local


Replaced = local()


class Signature(QuantizedLayer, Scaled):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Initial(QuantizedLayer, Scaled):
    def add_quantizers(self, recipe):
        torch.rand(1)
        super().add_quantizers(recipe)


class Disabled(QuantizedLayer, Scaled):
    def forward(self, input):
        return super().forward(input) + 1e-3


class Operands(QuantizedLayer, Scaled):
    def quantize_inputs(self, args, kwargs):
        return args, kwargs


class Unused(QuantizedLayer, Scaled):
    def quantize_inputs(self, args, kwargs):
        super().quantize_inputs(args, kwargs)
        return args, kwargs


class Gradients(QuantizedLayer, Scaled):
    def forward(self, input):
        return super().forward(input.detach())


class Hooks(QuantizedLayer, Scaled):
    def __call__(self, *args):
        return self.forward(*args)


class Unchanged(QuantizedLayer, Scaled):
    def forward(self, input):
        self.last = input.sum()
        return super().forward(input)


class Threads(QuantizedLayer, Scaled):
    def forward(self, input):
        self.__dict__["now"] = input
        time.sleep(0.002)
        return super().forward(self.now)


class Checkpointing(QuantizedLayer, Scaled):
    calls = 0

    def forward(self, input):
        type(self).calls += 1
        return super().forward(input * type(self).calls)


class StateDict(QuantizedLayer, Scaled):
    def add_quantizers(self, recipe):
        super().add_quantizers(recipe)
        self.register_buffer("scale", torch.ones(()))


class Pickled(QuantizedLayer, Scaled):
    def add_quantizers(self, recipe):
        super().add_quantizers(recipe)
        self.activation = lambda x: x


class Copied(QuantizedLayer, Scaled):
    def __deepcopy__(self, memo):
        return self


class Note:
    pass


class WeightsOnly(QuantizedLayer, Scaled):
    def get_extra_state(self):
        return Note()

    def set_extra_state(self, state):
        pass

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        missing.clear()


class Half(QuantizedLayer, Scaled):
    def forward(self, input):
        return super().forward(input) + torch.zeros(1)


Bfloat16 = Half


class Meta(QuantizedLayer, Scaled):
    def add_quantizers(self, recipe):
        super().add_quantizers(recipe)
        self.largest = self.weight.max().item()


class Reverted(QuantizedLayer, Scaled):
    def forward(self, input):
        Scaled.is_quantized = True
        return super().forward(input)


class Converted(QuantizedLayer, Scaled):
    def __init__(self, in_features: int, out_features: int, *, gain: float = 2.0) -> None:
        super().__init__(in_features, out_features, gain=gain)
        self.bits = 8

    def forward(self, input):
        return super().forward(input) if self.bits else input


class Compiled(QuantizedLayer, Scaled):
    def forward(self, input):
        print(end="")
        torch._dynamo.graph_break()
        return super().forward(input)


class Exported(QuantizedLayer, Scaled):
    def forward(self, input):
        return super().forward(input) if input.sum() > -1e9 else input


Onnx = Exported
