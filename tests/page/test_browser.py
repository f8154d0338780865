"""The page in a browser, where there is one: it sorts, searches, leads from name to row, needs no mouse."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import quantpatch as qp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
#: Of the npm package axe-core; it finds what those cannot use who see or hear differently.
AXE = os.environ.get("QUANTPATCH_AXE", "")


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    for package in ("jinja2", "itables", "vl_convert"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8 + n % 2, 8 + (n + 1) % 2) for n in range(30))).eval()
    qp.convert(model, "w4a8")
    batches = [torch.randn(64, 8)]
    tuned = qp.tune(model, batches, method="gptq", progress=False)
    path = tmp_path_factory.mktemp("page") / "report.html"
    return qp.report(model, batches[0], path=path, results=[tuned])


@pytest.fixture(params=["light", "dark"])
def page(browser, path, request):
    context = browser.new_context(color_scheme=request.param, viewport={"width": 400, "height": 900})
    page = context.new_page()
    wrong = []
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: r.url.startswith(("http:", "https:")) and wrong.append(r.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready=yes]", state="attached")
    yield page
    context.close()
    assert wrong == []


def first_cells(page, table, column=1):
    return page.locator(f"#table-{table} tbody td:nth-child({column})").all_inner_texts()


def test_a_heading_sorts_by_number_and_by_keyboard(page):
    heading = page.locator("#table-layers thead th", has_text="multiply-accumulates").first
    heading.click()
    once = [int(text.replace(",", "")) for text in first_cells(page, "layers", 5)]
    assert once in (sorted(once), sorted(once, reverse=True))
    order = heading.get_attribute("aria-sort")
    heading.locator("[tabindex='0']").first.focus()
    page.keyboard.press("Enter")
    page.locator(f"#table-layers thead th[aria-sort]:not([aria-sort='{order}'])").wait_for()


def test_a_search_finds_rows_and_a_name_leads_to_its_layer(page):
    page.locator("#table-quantizers_wrapper .dt-search input").fill("17.input")
    assert first_cells(page, "quantizers") == ["17.input_quantizer"]
    page.locator("#table-quantizers tbody a").first.click()
    assert first_cells(page, "layers") == ["17"]
    assert page.url.endswith("#layers")


def test_nothing_is_wider_than_a_narrow_screen(page):
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_all_rows_are_printed(page):
    assert len(first_cells(page, "quantizers")) == 25
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(first_cells(page, "quantizers")) == 60
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert len(first_cells(page, "quantizers")) == 25


@pytest.mark.skipif(not AXE, reason="QUANTPATCH_AXE is not the path of axe.min.js")
def test_axe_finds_nothing_serious(page):
    page.evaluate(Path(AXE).read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")] == []
