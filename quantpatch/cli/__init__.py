"""The command line: ``main.py`` has the command, ``app.py`` what its commands share.

Most of these are in ``lists.py`` and ``models.py``, ``bench`` in ``benchmark.py``; ``demo.py`` is what
``quantpatch demo`` runs.
"""

__all__: list[str] = []
