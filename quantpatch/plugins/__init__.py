"""Where layers, recipes, formats, calibrators and runtimes come from.

==============  ==============================================================================
hookspecs.py    the hooks, and the manual for those who write plugins
entry.py        which class replaces which
example.py      how to build and call a layer, for tests and exports
runtime.py      what runs an exported model, and what it takes
plugin.py       one plugin: imported and checked; those that are installed
answers.py      what its hooks return, checked
environment.py  what the environment variables allow and block
registry.py     all of them, in order, and what they say together
scaffold/       ``quantpatch new-plugin``
==============  ==============================================================================
"""

from quantpatch.plugins.entry import Entry
from quantpatch.plugins.example import Example
from quantpatch.plugins.hookspecs import hookimpl
from quantpatch.plugins.runtime import Kernels, OpenedFile, Runtime, WrittenFile

__all__ = ["Entry", "Example", "Kernels", "OpenedFile", "Runtime", "WrittenFile", "hookimpl"]
