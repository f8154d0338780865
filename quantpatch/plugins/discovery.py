"""The plugins that are installed: entry points of distributions. Nothing is imported."""

from __future__ import annotations

import importlib.metadata

from quantpatch.plugins import hookspecs
from quantpatch.plugins.plugin import Plugin


def discover() -> dict[str, Plugin]:
    """The plugins of the installed distributions, by name. Nothing is imported.

    Of several with one name there is one, which fails and names the others.
    """
    found: dict[str, Plugin] = {}
    points = importlib.metadata.entry_points(group=hookspecs.PROJECT)
    for point in sorted(points, key=lambda p: (p.name, p.dist.name if p.dist else "", p.value)):
        plugin = Plugin(point.name, point.load, where=point.value, dist=point.dist)
        taken = found.setdefault(point.name, plugin)
        if taken.provenance != plugin.provenance:
            taken.failure = taken.error(f"has the same name as one from {plugin.provenance}. Uninstall one")
        elif taken.where != plugin.where:
            taken.failure = taken.error(
                f"is declared twice, as {taken.where} and as {plugin.where}. Give one of them another name"
            )
    return found
