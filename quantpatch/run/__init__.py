"""``quantpatch run script.py``: an unmodified script with a block around it.

The command checks its options and becomes, in the same process, the Python that runs the script: so
``__main__``, ``sys.argv``, tracebacks, signals and exit codes are Python's own. That Python, and every
one that it starts, finds ``bootstrap/sitecustomize.py`` through ``PYTHONPATH``; it waits until torch is
imported and then opens the block for the whole process. Nothing is installed and no file is changed.

=============  =====================================================================================
settings.py    what was asked for, handed on in an environment variable
launcher.py    from the command to the Python that runs the script
bootstrap/     the first code of each process
session.py     the block of one process
models.py      the models that run there: calibrated and audited
report.py      what all processes report, printed when the script is over
=============  =====================================================================================
"""

from quantpatch.run.launcher import launch
from quantpatch.run.settings import RunSettings

__all__ = ["RunSettings", "launch"]
