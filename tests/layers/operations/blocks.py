"""Modules whose forward adds and multiplies by itself, in every way that Python and torch offer."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

OTHER = torch.add


def doubled(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return 2 * function(*args, **kwargs)

    return call


class Plus(nn.Module):
    def forward(self, x, y):
        return x + y


class InPlace(nn.Module):
    def forward(self, x, y):
        x = x.clone()
        x += y
        return x


class InPlaceElsewhere(nn.Module):
    def forward(self, x, y):
        parts = {"x": x.clone()}
        parts["x"] += y
        return parts["x"]


class Function(nn.Module):
    def forward(self, x, y):
        return torch.add(x, y)


class Keywords(nn.Module):
    def forward(self, x, y):
        return torch.add(other=y, input=x)


class Half(nn.Module):
    def forward(self, x, y):
        return torch.add(x, other=y, alpha=2)


class Method(nn.Module):
    def forward(self, x, y):
        return x.add(y)


class MethodInPlace(nn.Module):
    def forward(self, x, y):
        return x.clone().add_(y)


class Operator(nn.Module):
    def forward(self, x, y):
        return operator.add(x, y)


class Alias(nn.Module):
    def forward(self, x, y):
        return OTHER(x, y)


class Shadowed(nn.Module):
    """A local variable, seen by an inner function, with the name of a global operation."""

    def forward(self, x, y):
        OTHER = torch.sub

        def inner(z):
            return OTHER(z, y)

        return OTHER(x, y) + inner(y)


class Helper(nn.Module):
    def forward(self, x, y):
        return self._sum(y, x)

    def _sum(self, y, x):
        return x + y


class Private(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.__scale = 3

    def forward(self, x, y):
        return (x + y) * self.__scale


class Inherited(Plus):
    pass


class Super(nn.Module):
    def forward(self, x, y):
        return torch.relu(x + y) + len(super().extra_repr())


class Defaults(nn.Module):
    SCALE = 2

    def forward(self, x: Undefined, y: Undefined, *, scale: int = SCALE) -> Undefined:  # noqa: F821
        return (x + y) * scale


class Decorated(nn.Module):
    @doubled
    def forward(self, x, y):
        return x + y


class Lambda(nn.Module):
    def forward(self, x, y):
        return sum((lambda part: x + part)(z) for z in (y,))


class Nested(nn.Module):
    def forward(self, x, y):
        def add(a):
            if a.shape[0] + 1 > 0 and a.dim() + len(a.shape):
                return a + y
            return a

        return add(x)


def closed_over(scale: int) -> type:
    class Closure(nn.Module):
        def forward(self, x, y):
            return (x + y) * scale

    Closure.__qualname__ = "Closure"
    return Closure


Closure = closed_over(5)

SUMS = [
    Plus, InPlace, InPlaceElsewhere, Function, Keywords, Half, Method, MethodInPlace, Operator, Alias, Helper,
    Private, Inherited, Super, Defaults, Decorated, Lambda, Nested, Closure,
]  # fmt: skip


class Products(nn.Module):
    """Each kind of product, with weights and without."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.kernel = nn.Parameter(torch.randn(4, 4, 3))

    def forward(self, x):
        y = F.linear(x.tanh(), self.weight)
        y = F.conv1d(y.transpose(1, 2), self.kernel, padding=1).transpose(1, 2)
        scores = torch.matmul(x, y.transpose(1, 2)).softmax(-1)
        return F.scaled_dot_product_attention(query=x, key=y, value=scores @ y)


class Block(nn.Module):
    """A residual block as torchvision has them."""

    def __init__(self, channels: int, depth: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.inner = Block(channels, depth - 1) if depth > 1 else None

    def forward(self, x):
        identity = x if self.inner is None else self.inner(x)
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += identity
        return self.relu(out)


class Chain(nn.Module):
    def forward(self, x, y):
        return x + y + x * 2


class NoSum(nn.Module):
    def forward(self, x, y):
        n = x.shape[0] + 1
        return torch.maximum(x, y)[: n + len(y)]


class Starred(nn.Module):
    def forward(self, x, y):
        return torch.add(*(x, y))


class CalledTarget(nn.Module):
    def forward(self, x, y):
        self.find(x)[0] += y
        return x

    def find(self, x):
        return x
