"""Helpers for training."""

from pytorch_quantization.optim import helper

__all__ = ["helper"]
