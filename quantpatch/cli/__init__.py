"""The command line: ``main.py`` has the commands, ``demo.py`` what ``quantpatch demo`` runs."""

__all__: list[str] = []
