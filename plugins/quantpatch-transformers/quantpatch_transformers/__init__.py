"""The quantpatch plugin for transformers.

Most of transformers is built from ``torch.nn`` and needs no plugin. What does is its own linear layer,
``transformers.pytorch_utils.Conv1D``, of which GPT-2 and its relatives are made. Everything is named as
text: this module is imported when plugins are listed, and must not bring transformers along.
"""

from __future__ import annotations

from collections.abc import Iterable

from quantpatch.entries import Entry
from quantpatch.hookspecs import hookimpl

__all__ = ["quantpatch_entries"]


@hookimpl
def quantpatch_entries() -> Iterable[Entry]:
    """``Conv1D``, the linear layer of GPT-2."""
    return [Entry("transformers.pytorch_utils", "Conv1D", "quantpatch_transformers.conv1d:QuantConv1D")]
