"""The page's pictures as SVG, drawn by Vega: they need no script and no network to be seen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from quantpatch.errors import MissingExtraError

# Colours that keep apart for most eyes, in light and in dark; float is the striking one.
_FLOAT = "#d62728"
_COLORS = ("#4c78a8", "#72b7b2", "#54a24b", "#b279a2", "#9d755d", "#eeca3b", "#bab0ac")
_ROOT = "(model)"
_LONGEST = 20  # characters of a label
_MOST = 400  # rectangles, which are then 800 square pixels on average
_SCHEMA = "https://vega.github.io/schema/vega/v6.json"


def _vega() -> Any:
    try:
        import vl_convert
    except ImportError:
        raise MissingExtraError.of("report", "vl-convert-python", "qp.report") from None
    return vl_convert


def _clean(svg: str) -> str:
    """An SVG to stand within a page: as wide as there is room, in the page's colour of text."""
    svg = re.sub(r'^<svg([^>]*?) width="(\d+)" height="\d+"', r'<svg\1 style="max-width:\2px"', svg)
    return svg.replace('fill="#000"', 'fill="currentColor"').replace('stroke="#888"', 'stroke="currentColor"')


def treemap(cells: Sequence[tuple[str, str, int]]) -> str:
    """Rectangles as large as their numbers, coloured by kind.

    Args:
        cells: Name, kind and number of each. The kind ``"float"`` has the striking colour. Where there are
            more than can be seen, those of a module are one.
    """
    cells = _joined(cells)
    kinds = [kind for kind in dict.fromkeys(kind for _, kind, _ in cells) if kind != "float"]
    colors = [_COLORS[n % len(_COLORS)] for n in range(len(kinds))]
    total = sum(size for _, _, size in cells) or 1
    values: list[dict[str, Any]] = [{"id": _ROOT, "parent": None}]
    for number, (name, kind, size) in enumerate(cells):
        said = f"{name or _ROOT}: {size:,} multiply-accumulates, {size / total:.1%}, {kind}"
        values.append(
            {
                "id": str(number),
                "parent": _ROOT,
                "name": _label(name) or _ROOT,
                "size": size,
                "kind": kind,
                "said": said,
            }
        )
    on = "scale('color', datum.kind)"
    corners = {"x": {"field": "x0"}, "y": {"field": "y0"}, "x2": {"field": "x1"}, "y2": {"field": "y1"}}
    spec = {
        "$schema": _SCHEMA,
        "width": 1000,
        "height": 320,
        "background": None,
        "data": [
            {
                "name": "tree",
                "values": values,
                "transform": [
                    {"type": "stratify", "key": "id", "parentKey": "parent"},
                    {
                        "type": "treemap",
                        "field": "size",
                        "sort": {"field": "value", "order": "descending"},
                        "size": [{"signal": "width"}, {"signal": "height"}],
                        "paddingInner": 1,
                    },
                ],
            },
            {
                "name": "leaves",
                "source": "tree",
                "transform": [{"type": "filter", "expr": "datum.size > 0"}],
            },
            {
                "name": "labels",
                "source": "leaves",
                "transform": [
                    {"type": "filter", "expr": "datum.x1 - datum.x0 > 30 && datum.y1 - datum.y0 > 12"}
                ],
            },
        ],
        "scales": [
            {
                "name": "color",
                "type": "ordinal",
                "domain": ["float", *kinds],
                "range": [_FLOAT, *colors],
            }
        ],
        "legends": [{"fill": "color", "orient": "bottom", "direction": "horizontal", "columns": 4}],
        "marks": [
            {
                "type": "rect",
                "from": {"data": "leaves"},
                "encode": {
                    "enter": {
                        **corners,
                        "fill": {"scale": "color", "field": "kind"},
                        "description": {"field": "said"},
                        "tooltip": {"field": "said"},
                    }
                },
            },
            {
                "type": "text",
                "interactive": False,
                "from": {"data": "labels"},
                "encode": {
                    "enter": {
                        "x": {"signal": "(datum.x0 + datum.x1) / 2"},
                        "y": {"signal": "(datum.y0 + datum.y1) / 2"},
                        "text": {"field": "name"},
                        "align": {"value": "center"},
                        "baseline": {"value": "middle"},
                        "fill": {
                            "signal": f"contrast('#fff', {on}) > contrast('#111', {on}) ? '#fff' : '#111'"
                        },
                        "limit": {"signal": "max(1, datum.x1 - datum.x0 - 6)"},
                    }
                },
            },
        ],
    }
    return _clean(_vega().vega_to_svg(spec))


def _joined(cells: Sequence[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """At most as many cells as can be seen: by modules as deep as that allows, then all but the largest."""
    found = list(cells)
    depth = max((name.count(".") for name, _, _ in found), default=0)
    while len(found) > _MOST and depth:
        sums: Counter[tuple[str, str]] = Counter()
        for name, kind, size in cells:
            sums[".".join(name.split(".")[:depth]), kind] += size
        found = [(name, kind, size) for (name, kind), size in sums.items()]
        depth -= 1
    if len(found) > _MOST:
        found.sort(key=lambda cell: -cell[2])
        rest: Counter[str] = Counter()
        for _, kind, size in found[_MOST:]:
            rest[kind] += size
        found = found[:_MOST] + [("(smaller ones)", kind, size) for kind, size in rest.items()]
    return found


def _label(name: str) -> str:
    """The end of a name, which tells it from its neighbours."""
    parts = name.split(".")
    while len(parts) > 1 and len(".".join(parts)) > _LONGEST:
        del parts[0]
    return ".".join(parts)


def histogram(
    edges: Sequence[float], counts: Sequence[int], limits: Iterable[float], before: Sequence[int] = ()
) -> str:
    """Bars, with lines where a range ends, and the outline of what the bars were before.

    Args:
        edges: Of the bars, one more than there are.
        counts: How high they are.
        limits: Where lines stand.
        before: How high the outline is; empty for none.
    """
    outline = [
        {"at": edge, "count": count} for edge, count in zip(edges, [*before, *before[-1:]], strict=False)
    ]
    count = {"field": "count", "type": "quantitative", "axis": None, "scale": {"type": "sqrt"}}
    bars = [
        {"from": low, "to": high, "count": count}
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    x = {"field": "from", "type": "quantitative", "axis": {"title": None, "tickCount": 4, "grid": False}}
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": 200,
        "height": 60,
        "background": None,
        "config": {"view": {"stroke": None}},
        "layer": [
            {
                "data": {"values": bars},
                "mark": {"type": "bar", "color": _COLORS[0], "aria": False},
                "encoding": {
                    "x": x,
                    "x2": {"field": "to"},
                    "y": count,
                    "y2": {"datum": 0},
                },
            },
            {
                "data": {"values": outline},
                "mark": {
                    "type": "line",
                    "interpolate": "step-after",
                    "color": "#888",
                    "strokeWidth": 1,
                    "aria": False,
                },
                "encoding": {"x": {"field": "at", "type": "quantitative"}, "y": count},
            },
            {
                "data": {"values": [{"at": limit} for limit in limits]},
                "mark": {"type": "rule", "color": _FLOAT, "strokeDash": [3, 2], "aria": False},
                "encoding": {"x": {"field": "at", "type": "quantitative"}},
            },
        ],
    }
    return _clean(_vega().vegalite_to_svg(spec))


def frontier(points: Sequence[tuple[float, float, str]], cost: str) -> str:
    """Points of cost against metric.

    Args:
        points: Cost, metric and kind of each.
        cost: What cost is counted in.
    """
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": 640,
        "height": 260,
        "background": None,
        "data": {"values": [{"cost": c, "metric": m, "kind": kind} for c, m, kind in points]},
        "mark": {"type": "point", "filled": True, "size": 70},
        "encoding": {
            "x": {"field": "cost", "type": "quantitative", "title": cost},
            "y": {"field": "metric", "type": "quantitative", "scale": {"zero": False}},
            "color": {"field": "kind", "type": "nominal", "title": None},
            "shape": {"field": "kind", "type": "nominal", "title": None},
        },
    }
    return _clean(_vega().vegalite_to_svg(spec))
