"""The patch itself: construction is intercepted here, and nothing else about quantization is known.

===================  ============================================================================
hooks.py             stand in for the ``__init__`` of classes, and for functions
hooked_init.py       what a hooked class shows as its ``__init__``
fitness.py           whether a class can take another one's place
slots.py             where hooks stand, and what stood there before
construction.py      when a construction is over, whatever called what
block.py             one block: who decides what is built in a context, from its opening to its end
statements.py        changes that an interrupt between two instructions cannot split
import_watch.py      targets whose module is imported later
built_modules.py     the outermost modules that a block has built
torch_state.py       whether PyTorch is what it was
torch_settings.py    and is set as it was
===================  ============================================================================
"""

from quantpatch.interception.hooks import Slot

__all__ = ["Slot"]
