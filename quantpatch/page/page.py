"""``report``: what is known of a quantized model, as one HTML file that opens without a network."""

from __future__ import annotations

import base64
import importlib
import importlib.resources
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from quantpatch.analysis import CoverageReport, compare
from quantpatch.analysis.audit import audit
from quantpatch.errors import ArgumentTypeError, FileError, MissingExtraError, listed
from quantpatch.export import ExportReport
from quantpatch.export.onnx.comparison import Latency
from quantpatch.layers.base import quantized_weights
from quantpatch.mixed_precision import SearchResult
from quantpatch.page import charts
from quantpatch.page.sections import Section, formats_of, layers, quantizers, sections_of
from quantpatch.page.seen import Seen, seen_in
from quantpatch.reports import Summary, summary
from quantpatch.reports.render import as_percent
from quantpatch.reports.report import Report
from quantpatch.torch_tools.atomic_files import own_version, written_whole
from quantpatch.torch_tools.class_swap import written_name
from quantpatch.torch_tools.forward import arguments, as_batch, demand_model, uncompiled

_FIGURES = 120  # quantizers whose histograms are drawn
_WORTH = 0.01  # of the multiplications, from which on a float part is named
_LOW = 20.0  # dB


@attrs.frozen
class Advice:
    """What to do next.

    Attributes:
        text: In a sentence or two.
        code: To paste; empty for none.
    """

    text: str
    code: str = ""


def report(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    path: str | os.PathLike[str] = "report.html",
    results: Iterable[Report] = (),
    float_model: nn.Module | None = None,
    title: str = "",
) -> Path:
    """Writes what is known of a quantized model as a page, to open in a browser or to hand on.

    ::

        found = qp.search(model, accuracy, data=batches)
        qp.report(model, images, results=[found], path="report.html")

    The page is one file that loads nothing: how much of the model's arithmetic runs quantized, what to do
    next, each layer and quantizer with histograms of what it sees, and what else is handed over. The model is
    run on the arguments, in eval mode, and is as it was.

    Args:
        model: The model.
        args: Arguments to run it on: a tensor, or a tuple.
        kwargs: Keyword arguments to run it on.
        path: Where to write; the file is written whole or not at all.
        results: What other functions returned, such as ``search``, ``sensitivity``, ``tune``, ``prepare`` and
            ``export_onnx``.
        float_model: The float model, to compare each layer's output with.
        title: Stands above it; default: the model's class.

    Returns:
        The file.

    Raises:
        ArgumentTypeError: ``model`` is not a model, or a result not a report.
        MissingExtraError: A package of the extra ``report`` is not installed.
        FileError: The file cannot be written.
    """
    demand_model(model, "report")
    given = list(results)
    for result in given:
        if not isinstance(result, Report):
            raise ArgumentTypeError(
                f"results: {result!r} is not what a function of quantpatch returned, such as qp.search",
                results=result,
            )
    path = checked_path(path)
    args, kwargs = arguments(args, kwargs)
    coverage = next((r for r in given if isinstance(r, CoverageReport)), None)
    coverage = audit(model, args, kwargs=kwargs) if coverage is None else coverage
    runner = uncompiled(model)
    seen = seen_in(runner, lambda: runner(*args, **kwargs))
    if float_model is not None:
        given.append(compare(model, float_model, [as_batch(runner, args, kwargs)]))
    calls = _calls(runner, args, kwargs, given, float_model, path)
    write_page(path, runner, coverage, seen, given, calls=calls, title=title)
    return path


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Where a page may be written.

    Raises:
        MissingExtraError: A package of the extra ``report`` is not installed.
        FileError: The file is not called as pages are.
    """
    _extra()
    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise FileError(f"{path} is to be a page: call it {path.stem}.html", path=str(path))
    return path


def write_page(
    path: Path,
    model: nn.Module,
    coverage: CoverageReport,
    seen: Mapping[str, Seen],
    results: Sequence[Report] = (),
    *,
    calls: str,
    title: str = "",
) -> None:
    """Writes the page of a model that has run.

    Args:
        path: Where to.
        model: The model.
        coverage: How much of it ran quantized.
        seen: What its quantizers saw, by name.
        results: What else is known of it.
        calls: What made the page.
        title: Stands above it; default: the model's class.
    """
    template, style, script, licenses = _extra()
    overview = summary(model)
    shown = [r for r in results if not isinstance(r, (CoverageReport, Summary))]
    sections = [layers(coverage, overview), *sections_of(shown), quantizers(overview, seen)]
    cells = [
        (row.module, format, row.macs)
        for row, format in zip(coverage.rows, formats_of(coverage, overview), strict=True)
        if not row.of_weight and row.macs
    ]
    drawn = list(seen.values())
    if len(drawn) > _FIGURES:  # those whose ranges cut off most
        drawn = sorted(drawn, key=lambda look: -(look.clipped or 0.0))[:_FIGURES]
    text = template.render(
        title=title or written_name(type(model)),
        headline=coverage.headline(),
        numbers=_numbers(model, coverage, shown),
        treemap=charts.treemap(cells) if cells else "",
        advices=_advices(coverage, overview, shown, sections),
        sections=sections,
        figures=[{"picture": _picture(look), "text": _caption(look)} for look in drawn],
        figures_note=f"The values of {len(drawn)} of {len(seen)} quantizers in this run, each with its range "
        f"as dashed lines; heights are square roots of counts.",
        environment=_environment(),
        calls=calls,
        table_style=style,
        table_script=script,
        licenses=licenses,
    )
    with written_whole(path) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")


def _extra() -> tuple[Any, str, str, str]:
    """The template; the style sheet and, in base64, the script of tables; and whose these are."""
    for package in ("jinja2", "itables", "vl_convert"):
        try:
            importlib.import_module(package)
        except ImportError:  # noqa: PERF203
            name = package.replace("vl_convert", "vl-convert-python")
            raise MissingExtraError.of("report", name, "qp.report") from None
    jinja2 = importlib.import_module("jinja2")
    here = importlib.resources.files("quantpatch.page")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((here / "page.html.jinja").read_text(encoding="utf-8"))
    tables = importlib.resources.files("itables") / "html"
    code = (tables / "dt_bundle.js").read_bytes()
    script = base64.b64encode(code).decode()
    # A copy of the script has to have its notices where they can be read.
    _, _, licenses = code.decode().partition("Bundled license information:")
    licenses = licenses.partition("*/")[0].replace("(*", "").replace("*)", "").strip()
    style = (tables / "dt_bundle.css").read_text(encoding="utf-8")
    return template, importlib.import_module("markupsafe").Markup(style), script, licenses


def _numbers(model: nn.Module, coverage: CoverageReport, results: Sequence[Report]) -> dict[str, str]:
    """What is to be seen at once."""
    found = {
        "of the multiplications quantized": as_percent(coverage.share),
        "multiply-accumulates": f"{coverage.macs:,}",
    }
    in_float = sum(p.numel() * p.element_size() for p in model.parameters())
    saved = 0.0
    for _, layer, operand, quantizer in quantized_weights(model):
        weight = getattr(layer, operand, None)
        if isinstance(weight, Tensor) and not quantizer.disabled:
            saved += weight.numel() * (weight.element_size() - quantizer.format.bits / 8)
    found["weights"] = f"{_size(in_float - saved)} ({_size(in_float)} in float)"
    for result in results:
        if isinstance(result, SearchResult):
            found["metric"] = f"{_short(result.metric)} ({_short(result.float_metric)} in float)"
        if (latency := _latency(result)) is not None:
            found["latency"] = f"{latency.ms:.3g} ms ({latency.float_ms:.3g} ms in float)"
    return found


def _latency(result: Report) -> Latency | None:
    compared = result.comparison if isinstance(result, ExportReport) else None
    return None if compared is None else compared.latency


def _size(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _short(metric: Any) -> str:
    return f"{metric:.4g}" if isinstance(metric, float) else str(metric)


def _advices(
    coverage: CoverageReport, overview: Summary, results: Sequence[Report], sections: Sequence[Section]
) -> list[Advice]:
    """What stands out, and what to do about it."""
    made: list[Advice] = []
    missing = [row.name for row in overview.rows if row.state == "dynamic (not calibrated)"]
    if missing:
        made.append(
            Advice(
                f"{len(missing)} quantizers have no range yet: {listed(missing, 4)}. Find them:",
                "qp.calibrate(model, batches, existing='keep')",
            )
        )
    if coverage.outgrown:
        names = listed((name for name, _ in coverage.outgrown), 4)
        made.append(
            Advice(
                f"Weights changed since their ranges were found: {names}. Calibrate again:",
                "qp.calibrate(model, batches, existing='overwrite')",
            )
        )
    floats = sorted((r for r in coverage.rows if not r.quantized and not r.of_weight), key=lambda r: -r.macs)
    for row in floats[:3]:
        if coverage.macs and row.macs / coverage.macs >= _WORTH:
            share = as_percent(row.macs / coverage.macs)
            roles = ", ".join(row.float_operands)
            made.append(
                Advice(f"{row.module or 'The model'} multiplies {share} in float ({roles}: {row.reason}).")
            )
    if coverage.to_paste:
        made.append(
            Advice("Forwards multiply by themselves. This quantizes their operands:", coverage.to_paste)
        )
    if coverage.unreached:
        made.append(Advice(f"No tensor passed through {listed(coverage.unreached, 4)}."))
    low = [c for s in sections if s.id == "noise" for c in s.rows if (c[2].order or 0.0) < _LOW]
    if low and not any(isinstance(result, SearchResult) for result in results):
        made.append(
            Advice(
                f"{len(low)} layers have less than {_LOW:g} dB to the noise. Find which need more bits:",
                "qp.search(model, evaluate, data=batches, max_drop=0.01)",
            )
        )
    slower = (latency for latency in map(_latency, results) if latency is not None and latency.is_slower)
    return [*made, *(Advice(latency.advice("The file")) for latency in slower)]


def _picture(look: Seen) -> str:
    limits = [limit for limit in (look.low, look.high) if limit is not None]
    return charts.histogram(look.edges, look.counts, limits, look.before)


def _caption(look: Seen) -> str:
    parts = [look.quantizer]
    if look.high is not None and look.low is not None:
        parts.append(f"range {look.low:.4g} to {look.high:.4g}")
    if look.clipped is not None:
        parts.append(f"{as_percent(look.clipped)} clipped")
    if look.zero_point:
        parts.append(f"zero point {look.zero_point}")
    if look.before:
        parts.append("the line: before tuning")
    return "; ".join(parts)


def _environment() -> dict[str, str]:
    return {
        "quantpatch": own_version(),
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
    }


def _calls(
    model: nn.Module, args: Any, kwargs: Any, results: Sequence[Report], float_model: Any, path: Path
) -> str:
    """The call that made the page, as far as values can be written."""

    def shown(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"<tensor {tuple(value.shape)}, {value.dtype}>"
        return repr(value) if isinstance(value, (int, float, str, bool)) else f"<{type(value).__name__}>"

    lines = [f"model = <{written_name(type(model))}>"]
    call = [f"({', '.join(map(shown, args))},)"]
    if kwargs:
        call.append(f"kwargs={{{', '.join(f'{key!r}: {shown(value)}' for key, value in kwargs.items())}}}")
    if results:
        call.append(f"results=[{', '.join(f'<{type(result).__name__}>' for result in results)}]")
    if float_model is not None:
        call.append("float_model=<float>")
    lines.append(f"qp.report(model, {', '.join(call)}, path={str(path.name)!r})")
    return "\n".join(lines)
