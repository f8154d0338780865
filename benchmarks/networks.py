"""Networks to export: small ones of the kinds that are deployed, in plain PyTorch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

__all__ = [
    "Inception",
    "LanguageModel",
    "Pyramid",
    "Transformer",
    "UNet",
    "decoder",
    "mobilenet",
    "plain_cnn",
    "recognizer",
    "resnet_stem",
    "segmentation_head",
    "small_resnet",
    "strided",
    "volumes",
]


class _Block(nn.Module):
    """A residual block as in ResNet-18."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.down = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.down(x))


def small_resnet() -> nn.Module:
    """A ResNet of six blocks for images of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        *(
            _Block(*sizes)
            for sizes in ((32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1))
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 100),
    )


def _normalized(inside: int, outside: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, size, stride, size // 2, bias=False), nn.BatchNorm2d(outside), nn.ReLU()
    )


def resnet_stem() -> nn.Module:
    """What every ResNet begins with: max pooling goes into a convolution and into the addition behind it."""
    return nn.Sequential(
        _normalized(3, 64, 7, 2),
        nn.MaxPool2d(3, 2, 1),
        _Block(64, 64, 1),
        _Block(64, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class _Mixed(nn.Module):
    """A block of Inception: convolutions of several sizes and max pooling side by side."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.small = _normalized(inside, width, 1)
        self.large = nn.Sequential(_normalized(inside, width, 1), _normalized(width, width, 3))
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.small(x), self.large(x), self.pool(x)], 1)


class Inception(nn.Sequential):
    """Two such blocks between convolutions."""

    def __init__(self) -> None:
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        super().__init__(
            _normalized(3, 64, 3), _Mixed(64, 32), _Mixed(128, 32), _normalized(192, 64, 1), *head
        )


class Pyramid(nn.Module):
    """A feature pyramid (arXiv 1612.03144): from coarse to fine by nearest neighbours and additions."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.fine, self.middle = _normalized(3, width, 3, 2), _normalized(width, width, 3, 2)
        self.coarse = _normalized(width, width, 3, 2)
        self.aside = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))
        self.up = nn.Upsample(scale_factor=2)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The finest level."""
        fine = self.fine(x)
        middle = self.middle(fine)
        y = self.aside[0](self.coarse(middle))
        y = self.aside[1](middle) + self.up(y)
        y = self.aside[2](fine) + self.up(y)
        return torch.as_tensor(self.smooth(y))


def segmentation_head() -> nn.Module:
    """Features to a map of classes, which is what the model returns."""
    return nn.Sequential(_normalized(64, 64, 3), nn.Conv2d(64, 21, 1))


def plain_cnn() -> nn.Module:
    """Convolutions one after the other, for digits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 10),
    )  # fmt: skip


def strided() -> nn.Module:
    """Four convolutions that halve what they get, as a network for embedded cameras begins."""
    widths = (16, 32, 64, 128, 128)
    layers: list[nn.Module] = []
    for inside, outside in itertools.pairwise(widths):
        layers += [nn.Conv2d(inside, outside, 3, 2, 1), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers)


def volumes() -> nn.Module:
    """Convolutions of short videos."""
    return nn.Sequential(
        nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Conv3d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Conv3d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


class _Excited(nn.Module):
    """Squeeze and excitation (arXiv 1709.01507)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, width // 4, 1),
            nn.ReLU(),
            nn.Conv2d(width // 4, width, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(x * self.gate(x))


def _separable(inside: int, outside: int, size: int, stride: int | tuple[int, int]) -> list[nn.Module]:
    """A depthwise and a pointwise convolution, each with batch norm and hard swish; large ones excited."""
    return [
        nn.Conv2d(inside, inside, size, stride, size // 2, groups=inside, bias=False),
        nn.BatchNorm2d(inside),
        nn.Hardswish(),
        *([_Excited(inside)] if size == 5 else []),
        nn.Conv2d(inside, outside, 1, bias=False),
        nn.BatchNorm2d(outside),
        nn.Hardswish(),
    ]


def recognizer() -> nn.Module:
    """What reads a line of text on a phone: separable convolutions, then a letter for each column."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(),
        *_separable(16, 32, 3, 1), *_separable(32, 64, 3, (2, 1)), *_separable(64, 64, 3, 1),
        *_separable(64, 128, 3, (2, 1)), *_separable(128, 128, 5, 1), *_separable(128, 256, 5, (2, 1)),
        nn.AvgPool2d((3, 2)), nn.Flatten(2), _Columns(), nn.Linear(256, 97),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


class _Columns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def decoder() -> nn.Module:
    """Transposed convolutions between others, their channels of different size as after batch norm."""
    up = [nn.ConvTranspose2d(32, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)]
    with torch.no_grad():
        for layer in up:
            layer.weight *= torch.logspace(-1, 0, layer.out_channels).reshape(1, -1, 1, 1)
    return nn.Sequential(
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        up[0], nn.ReLU(), up[1], nn.ReLU(),
        nn.Conv2d(16, 3, 3, padding=1),
    )  # fmt: skip


class _SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.narrow = nn.Conv2d(width, width // 4, 1)
        self.activation = nn.ReLU()
        self.widen = nn.Conv2d(width // 4, width, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.widen(self.activation(self.narrow(self.pool(x)))))
        return x * gate


class _Inverted(nn.Module):
    """MobileNetV3's block: widen, depthwise, squeeze and excite, narrow."""

    def __init__(
        self, inside: int, wide: int, outside: int, size: int, stride: int, *, excite: bool, hard: bool
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        kind = nn.Hardswish if hard else nn.ReLU
        if wide != inside:
            layers += [nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide), kind()]
        layers += [
            nn.Conv2d(wide, wide, size, stride, size // 2, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            kind(),
        ]
        if excite:
            layers.append(_SqueezeExcite(wide))
        layers += [nn.Conv2d(wide, outside, 1, bias=False), nn.BatchNorm2d(outside)]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


def mobilenet() -> nn.Module:
    """MobileNetV3-small (arXiv 1905.02244, table 2) for ten digits."""
    rows = (
        (16, 16, 16, 3, 2, True, False),
        (16, 72, 24, 3, 2, False, False),
        (24, 88, 24, 3, 1, False, False),
        (24, 96, 40, 5, 2, True, True),
        (40, 240, 40, 5, 1, True, True),
        (40, 240, 40, 5, 1, True, True),
        (40, 120, 48, 5, 1, True, True),
        (48, 144, 48, 5, 1, True, True),
        (48, 288, 96, 5, 2, True, True),
        (96, 576, 96, 5, 1, True, True),
        (96, 576, 96, 5, 1, True, True),
    )
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        *(_Inverted(*row[:5], excite=row[5], hard=row[6]) for row in rows),
        nn.Conv2d(96, 576, 1, bias=False),
        nn.BatchNorm2d(576),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(576, 1024),
        nn.Hardswish(),
        nn.Linear(1024, 10),
    )
    # As torchvision's: by torch's own initialization activations shrink from layer to layer.
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return model


def _double(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(),
        nn.Conv2d(outside, outside, 3, padding=1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Two steps down, two up by transposed convolutions, with skip connections."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = _double(3, width), _double(width, 2 * width)
        self.bottom = _double(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.after2 = _double(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.after1 = _double(2 * width, width)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Two maps for each pixel."""
        first = self.down1(x)
        second = self.down2(self.pool(first))
        y = self.up2(self.bottom(self.pool(second)))
        y = self.up1(self.after2(torch.cat([second, y], 1)))
        y = self.out(self.after1(torch.cat([first, y], 1)))
        assert isinstance(y, Tensor)
        return y


class LanguageModel(nn.Module):
    """A two-layer LSTM over tokens."""

    def __init__(self, tokens: int = 2000, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.rnn = nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the next token."""
        y: Tensor = self.head(self.rnn(self.embedding(ids))[0])
        return y


class Transformer(nn.Module):
    """BERT or GPT-2 of transformers, from a small configuration, with one tensor in and one out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

        if kind == "BERT":
            bert = BertConfig(
                vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
                intermediate_size=1024, max_position_embeddings=128,
            )  # fmt: skip
            self.model: nn.Module = BertModel(bert, add_pooling_layer=False)
        else:
            gpt2 = GPT2Config(
                vocab_size=1000, n_embd=256, n_layer=4, n_head=4, n_positions=128, use_cache=False,
                bos_token_id=0, eos_token_id=0,
            )  # fmt: skip
            self.model = GPT2Model(gpt2)

    def forward(self, ids: Tensor) -> Tensor:
        """The last hidden state."""
        y: Tensor = self.model(input_ids=ids).last_hidden_state
        return y
