"""The page about a model: what it says, and that it needs nothing but itself."""

from __future__ import annotations

import copy
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ArgumentTypeError, FileError, MissingExtraError
from quantpatch.page.seen import seen_in

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.w


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4), nn.ReLU(), nn.Linear(4, 4), Own()
    ).eval()


@pytest.fixture(scope="module")
def _extra():
    for package in ("jinja2", "itables", "vl_convert"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def page(_extra, tmp_path_factory):
    """The page of a model that was searched and measured, as text."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    model, in_float = build(), build()
    with torch.no_grad():
        results = [
            qp.search(model, data=X, candidates=["int8", "w4a8", None], max_drop=0.01),
            qp.sensitivity(model, lambda m: float(-(m(X) - in_float(X)).square().mean())),
            qp.configure(model, {"5": None}),
        ]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert qp.report(model, X, path=path, results=results, float_model=in_float, title="<i>Net</i>") == path
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]
    return path.read_text()


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_it_loads_nothing(page):
    tags = Tags(page).tags
    assert not [tag for tag, _ in tags if tag in ("link", "img", "iframe", "object", "embed")]
    assert not [attributes for tag, attributes in tags if tag == "script" and "src" in attributes]
    assert not [a for tag, a in tags if tag == "a" and not (a.get("href") or "#").startswith("#")]
    assert "default-src 'none'" in page
    assert len(page) < 5 * 2**20


def test_names_are_escaped(page):
    assert "<title>&lt;i&gt;Net&lt;/i&gt;</title>" in page
    assert "<i>Net" not in page


def test_it_says_how_much_runs_quantized_and_what_to_do_next(page):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert re.search(r"of the multiplications quantized \d+\.\d%", text)
    assert re.search(r"weights [\d.]+ KiB \( ?[\d.]+ KiB in float\)", text)
    assert re.search(r"metric 0\.99\d* \(1 in float\)", text)
    assert "What to do next" in text


def test_every_part_has_a_heading_that_the_navigation_leads_to(page):
    tags = Tags(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"layers", "recipes", "frontier", "cost", "noise", "quantizers", "seen", "made"} <= set(ids)
    targets = {a["href"][1:] for tag, a in tags if tag == "a" and (a.get("href") or "").startswith("#")}
    assert targets <= set(ids)


def test_tables_have_captions_and_headings_and_numbers_to_sort_by(page):
    tables = re.findall(r'<table class="sortable".*?</table>', page, re.DOTALL)
    assert len(tables) == 7  # with the rows of what configure changed
    for table in tables:
        assert "<caption>" in table
        assert 'scope="col"' in table
    assert re.search(r'data-order="[\d.]+">\d+\.\d%<', tables[0])
    assert "<td>Own<td>" in tables[0]
    assert "<td>float<td class=n" in tables[0]


def test_layers_lead_to_where_else_they_are(page):
    links = [a for tag, a in Tags(page).tags if tag == "a" and "data-find" in a]
    assert {(a["data-find"], a["href"]) for a in links} >= {("0", "#layers"), ("3", "#layers")}


def test_pictures_are_in_the_page_and_described(page):
    assert page.count("<svg") >= 3
    assert "multiply-accumulates, " in page  # of each rectangle
    assert "#d62728" in page  # what is float


@pytest.mark.usefixtures("_extra")
def test_a_model_without_ranges_is_told_how_to_get_them(tmp_path):
    model = build()
    qp.convert(model)
    text = qp.report(model, X, path=tmp_path / "report.html").read_text()
    assert "6 quantizers have no range yet: 0.input_quantizer" in text
    assert "qp.calibrate(model, batches, existing=&#39;keep&#39;)" in text


@pytest.mark.usefixtures("_extra")
def test_a_float_model_has_a_page_too(tmp_path):
    text = qp.report(build(), X, path=tmp_path / "report.html").read_text()
    assert "0.0%" in text


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, scale):
        return self.layer(x) * scale


@pytest.mark.usefixtures("_extra")
def test_a_model_that_takes_keywords_beside_arguments_is_compared(tmp_path):
    model, in_float = Scaled(), Scaled()
    qp.convert(model)
    given = {"kwargs": {"scale": 2.0}, "float_model": in_float, "path": tmp_path / "report.html"}
    assert 'id="noise"' in qp.report(model, torch.randn(2, 4), **given).read_text()


@pytest.mark.parametrize("package", ["jinja2", "itables", "vl_convert"])
def test_a_missing_package_is_an_error_with_the_line_that_installs_it(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'quantpatch\[report\]'"):
        qp.report(build(), X, path=tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_extra")
def test_what_is_no_report_and_no_page_is_refused(tmp_path):
    with pytest.raises(ArgumentTypeError, match="3 is not what a function of quantpatch returned"):
        qp.report(build(), X, path=tmp_path / "report.html", results=[3])
    with pytest.raises(FileError, match=r"call it report\.html"):
        qp.report(build(), X, path=tmp_path / "report.pdf")
    with pytest.raises(FileError, match="there is no folder"):
        qp.report(build(), X, path=tmp_path / "nowhere" / "report.html")
    assert not list(tmp_path.iterdir())


def test_what_a_quantizer_sees_is_counted_with_what_its_range_cuts_off():
    model = nn.Sequential(nn.Linear(4, 2))
    qp.convert(model)
    model[0].input_quantizer.amax = 1.0
    x = torch.tensor([[-2.0, -0.5, 0.5, 0.75]])
    modes = copy.deepcopy([m.training for m in model.modules()])
    seen = seen_in(model, lambda: model(x))
    look = seen["0.input_quantizer"]
    assert (look.low, look.high, look.clipped, look.of_weight) == (-1.0, 1.0, 0.25, False)
    assert sum(look.counts) == 4
    assert (look.edges[0], look.edges[-1]) == (-2.0, 0.75)
    assert seen["0.weight_quantizer"].of_weight
    assert seen["0.weight_quantizer"].high is None
    assert [m.training for m in model.modules()] == modes
    assert not model[0].input_quantizer._forward_pre_hooks.keys() - {"quantpatch"}


def test_of_unsigned_integers_the_range_begins_where_the_zero_point_says():
    model = nn.Sequential(nn.Linear(4, 2))
    qp.convert(model)
    model[0].input_quantizer.amax = 2.0
    model[0].input_quantizer.use_zero_point(85, 2.0)
    look = seen_in(model, lambda: model(torch.tensor([[-2.0, -0.5, 0.5, 3.0]])))["0.input_quantizer"]
    assert (look.low, look.high, look.zero_point) == (-1.0, 2.0, 85)
    assert look.clipped == 0.5


def test_of_a_weight_that_was_tuned_there_are_the_values_from_before_as_well():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32))
    qp.convert(model, "w4a8")
    before = model[0].weight.detach().clone()
    x = torch.randn(64, 4) @ torch.randn(4, 16)
    assert qp.tune(model, [x], method="gptq", progress=False).tuned
    seen = seen_in(model, lambda: model(x))
    look = seen["0.weight_quantizer"]
    low, high = look.edges[0], look.edges[-1]
    assert look.before == tuple(torch.histc(before, len(look.counts), low, high).int().tolist())
    assert sum(look.counts) == sum(look.before) == before.numel()
    assert look.counts != look.before
    assert seen["0.input_quantizer"].before == ()


def test_the_notices_of_the_script_that_is_in_the_page_can_be_read(page):
    assert "DataTables" in page.partition("<details>")[2]
    assert "SpryMedia Ltd" in page.partition("<details>")[2]
