"""Attention: multi-head attention with all of its products quantized, and the encoder around it.

torch computes attention in ways that pass by any layer inside: ``nn.MultiheadAttention`` reads the weight of
its ``out_proj`` without calling it, and in eval mode a C++ kernel does the whole layer, or a whole
``nn.TransformerEncoderLayer`` with its two linear layers. ``QuantMultiheadAttention`` computes in the open.
The transformer layers need no replacement: torch leaves its C++ path where a module inside has a hook,
and every ``TensorQuantizer`` has one. Only ``nn.TransformerEncoder`` does not look, and would hand a nested
tensor to layers that cannot take it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from quantpatch.errors import InputError
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.operations.running import softmax_of_visible
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.recipes.descriptor import Axis, QuantDescriptor, Recipe
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.fx import leaf_in_fx

__all__ = ["QuantMultiheadAttention", "QuantTransformerEncoder"]

# The activations inside, and the axis that products sum over: q @ k^T over the features of a head, and
# probabilities @ v over the positions of the keys.
_INNER = {"q": -1, "k": -1, "v": -2, "probabilities": -1, "out_proj_input": -1}


class QuantMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with the operands of all its products quantized.

    These are the inputs (``query``, ``key``, ``value``) and weights (``in_proj_weight``, or
    ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``) of the projections, both operands of the two
    products of attention (``q`` and ``k``; ``probabilities`` and ``v``), and ``out_proj_input`` and
    ``out_proj_weight``; the quantizer of each has its name and ``_quantizer``.

    While any of them is active, attention is computed as torch's slow path does, and never in its C++ fast
    path. With ``probabilities`` left float and ``need_weights=False`` it is
    ``F.scaled_dot_product_attention``; otherwise the probabilities have to be formed, as they have for
    ``need_weights=True``. They are quantized before dropout, so that their range is the same in training and
    in eval mode, and the weights that are returned are the quantized ones.
    """

    inputs = ("query", "key", "value")
    parts = {"out_proj": NonDynamicallyQuantizableLinear}

    def weight_axes(self) -> Mapping[str, Axis]:
        """One weight for all three projections, or one for each, and that of the output's."""
        separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        names = ("in_proj_weight",) if self._qkv_same_embed_dim else separate
        return dict.fromkeys((*names, "out_proj_weight"), 0)

    @property
    def out_proj_weight(self) -> Tensor:
        """The weight of ``out_proj``, which is an operand of this layer: ``out_proj`` is never called."""
        return self.out_proj.weight

    def descriptors(self, recipe: Recipe) -> Iterable[tuple[str, QuantDescriptor]]:
        """The inputs and weights, then the activations inside."""
        yield from super().descriptors(recipe)
        if recipe.input is not None:
            for name, axis in _INNER.items():
                yield name, recipe.input.for_axes(None, axis)

    @leaf_in_fx
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention.forward``."""
        if not any(quantizer.is_active for quantizer in self.quantizers().values()):
            plain = nn.MultiheadAttention.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                is_causal,
            )  # fmt: skip
            return self.quantize_output(plain)  # type: ignore[no-any-return]
        # What F.multi_head_attention_forward computes, in the same order, with quantized operands.
        if query.is_nested or key.is_nested or value.is_nested:
            raise InputError(
                "a quantized MultiheadAttention takes padded tensors with a key_padding_mask, not "
                "nested ones. If nn.TransformerEncoder makes them: build it inside the block too, or "
                "with enable_nested_tensor=False"
            )
        batched: bool = F._mha_shape_check(  # type: ignore[attr-defined]
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        q_in, k_in, v_in = self._quantized_inputs(query, key, value)
        if is_causal and attn_mask is None:
            raise InputError(
                "is_causal is a hint that attn_mask is the causal mask, and needs it: "
                "attn_mask=nn.Transformer.generate_square_subsequent_mask(length)"
            )
        if q_in.shape[-1] != self.embed_dim:
            raise InputError(f"query has {q_in.shape[-1]} features, expected embed_dim={self.embed_dim}")
        if k_in.shape[:-1] != v_in.shape[:-1]:
            raise InputError(
                f"key and value have other lengths or batches: {tuple(key.shape)} and {tuple(value.shape)}"
            )
        weights = self.quantize_weights()
        # As the inputs lie in memory: a product with a transposed tensor is several times slower.
        projected = self._project(q_in, k_in, v_in, weights)
        q, k, v = (
            x.unsqueeze(1) if not batched else x.transpose(0, 1) if self.batch_first else x for x in projected
        )
        length, batch, _ = q.shape  # positions first, then the batch
        mask = self._merged_mask(attn_mask, key_padding_mask, q, k, batched)
        q, k, v = self._with_extras(q, k, v)
        q, k, v = (self._quantized(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
        dropout = self.dropout if self.training else 0.0

        probabilities = None
        inner = self.quantizer("probabilities")
        if need_weights or (inner is not None and inner.is_active):
            probabilities = self._probabilities(q, k, mask, dropout)
            attended = torch.bmm(probabilities, v)
        else:
            # (batch, heads, positions, features), which is what fused kernels are written for.
            q, k, v = (x.view(batch, self.num_heads, *x.shape[1:]) for x in (q, k, v))
            causal = is_causal and key_padding_mask is None
            if causal or mask is None:
                mask = None
            elif mask.shape[0] == 1:
                mask = mask.unsqueeze(0)
            else:
                mask = mask.view(batch, -1, *mask.shape[1:])
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal).flatten(0, 1)

        # The heads beside their features again, in the order of the axes that was given.
        heads = torch.unflatten(attended, 0, (batch, self.num_heads))
        joined = heads.transpose(1, 2) if batched and self.batch_first else heads.permute(2, 0, 1, 3)
        joined = joined.flatten(2)
        joined = self._quantized("out_proj_input", joined, self._batch_axis(joined))
        output = F.linear(joined, weights.get("out_proj_weight", self.out_proj.weight), self.out_proj.bias)
        if not batched:
            output = output.squeeze(1)
        output = self.quantize_output(output)
        if not need_weights:
            return output, None
        assert probabilities is not None
        shown = probabilities.view(batch, self.num_heads, length, -1)
        if average_attn_weights:
            shown = shown.mean(dim=1)
        return output, shown if batched else shown.squeeze(0)

    def _quantized(self, operand: str, x: Tensor, batch_axis: int = 0) -> Tensor:
        quantizer = self.quantizer(operand)
        if quantizer is None:
            return x
        result: Tensor = quantizer(x, batch_axis=batch_axis)
        return result

    def _batch_axis(self, x: Tensor) -> int:
        """That of an input or output."""
        return 1 if x.dim() == 3 and not self.batch_first else 0

    def _quantized_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs, each through its quantizer: once, where tensor and quantizer are the same."""
        done: list[tuple[Tensor, TensorQuantizer | None, Tensor]] = []
        for name, x in (("query", query), ("key", key), ("value", value)):
            quantizer = self.quantizer(name)
            for other, its, result in done:
                if other is x and _agree(quantizer, its):
                    done.append((x, quantizer, result))
                    break
            else:
                done.append((x, quantizer, self._quantized(name, x, self._batch_axis(x))))
        return done[0][2], done[1][2], done[2][2]

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the inputs' shapes; in one product where all are the same."""
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            packed = weights.get("in_proj_weight", self.in_proj_weight)
            if query is key and key is value:
                q, k, v = F.linear(query, packed, bias).chunk(3, dim=-1)
                return q, k, v
            parts = packed.chunk(3)
        else:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            parts = tuple(weights.get(name, getattr(self, name)) for name in names)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True))
        return q, k, v

    def _merged_mask(
        self, mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor, batched: bool
    ) -> Tensor | None:
        """Both masks as one to add to the scores: (1 or batch * heads, positions, keys), or None."""
        length, batch, _ = q.shape
        keys = k.shape[0]
        extra = (self.bias_k is not None) + bool(self.add_zero_attn)  # keys that no mask hides
        heads = self.num_heads
        if padding is not None:
            padding = _additive(padding, "key_padding_mask", mask, q.dtype)
            if not batched:
                padding = padding.unsqueeze(0)
            if padding.shape != (batch, keys):
                raise InputError(f"key_padding_mask: expected {(batch, keys)}, got {tuple(padding.shape)}")
        if mask is not None:
            mask = _additive(mask, "attn_mask", None, q.dtype)
            wanted = (length, keys) if mask.dim() == 2 else (batch * heads, length, keys)
            if mask.shape != wanted:
                raise InputError(f"attn_mask: expected {wanted}, got {tuple(mask.shape)}")
            mask = F.pad(mask if mask.dim() == 3 else mask.unsqueeze(0), (0, extra))
        if padding is None:
            return mask
        padding = F.pad(padding, (0, extra)).view(batch, 1, 1, keys + extra)
        padding = padding.expand(-1, heads, -1, -1).reshape(batch * heads, 1, keys + extra)
        return padding if mask is None else mask + padding

    def _with_extras(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The heads beside the batch: (batch * heads, positions, features), with the keys of the options."""
        batch = q.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.repeat(1, batch, 1)])
            v = torch.cat([v, self.bias_v.repeat(1, batch, 1)])
        q, k, v = (
            torch.unflatten(x, -1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3).flatten(0, 1)
            for x in (q, k, v)
        )
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1) for x in (k, v))
        return q, k, v

    def _probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Softmax of the scores, quantized, after dropout."""
        scaled = q * math.sqrt(1.0 / q.shape[-1])
        keys = k.transpose(-2, -1)
        scores = torch.bmm(scaled, keys) if mask is None else torch.baddbmm(mask, scaled, keys)
        probabilities = scores.softmax(dim=-1) if mask is None else softmax_of_visible(scores)
        probabilities = self._quantized("probabilities", probabilities)
        return F.dropout(probabilities, dropout) if dropout > 0.0 else probabilities


def _agree(first: TensorQuantizer | None, second: TensorQuantizer | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.agrees_with(second)


def _additive(mask: Tensor, name: str, other: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A mask to add: -inf where a boolean one is True."""
    canonical = F._canonical_mask(
        mask=mask,
        mask_name=name,
        other_type=F._none_or_dtype(other),
        other_name="attn_mask",
        target_type=dtype,
        check_other=other is not None,
    )
    assert canonical is not None
    return canonical


class QuantTransformerEncoder(QuantizedLayer, nn.TransformerEncoder):
    """``nn.TransformerEncoder`` that makes no nested tensors while quantizers are inside.

    It has no quantizers of its own. Padded positions then hold what the layers compute for them, where
    torch's nested tensors give zeros.
    """

    inputs = ()
    weights = {}

    def descriptors(self, recipe: Recipe) -> Iterable[tuple[str, QuantDescriptor]]:
        """None: its layers have them."""
        return ()

    @leaf_in_fx
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See ``nn.TransformerEncoder.forward``."""
        holds_quantizers = any(isinstance(module, TensorQuantizer) for module in self.modules())
        return self.run_float({"use_nested_tensor": False} if holds_quantizers else {}, args, kwargs)
