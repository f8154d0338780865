"""Packages that only some functions need, or an error that says how to install them."""

from __future__ import annotations

from typing import Any

from quantpatch.errors import MissingExtraError


def safetensors_for(purpose: str) -> Any:
    """The package ``safetensors``, with what it has for torch.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise MissingExtraError.of("safetensors", "safetensors", purpose) from None
    return safetensors
