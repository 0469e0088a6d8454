"""Pages of a tiny real sweep in Chromium: no word in the console, nothing loaded from elsewhere, keys, colours, print.

``FEDSIM_SCREENSHOTS=DIR`` keeps the pictures that a person should look at.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chromium import PROGRAM, browser

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine: install the package chromium"),
]
SWEEP = (
    "-m experiment=quickstart strategy=fedavg,fedspeed seed=0,1 rounds=3 engine=serial tracker=quiet "
    "tracker.plots=true evaluation.holdout=0.2 evaluation.clients_every=1"
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    fedsim = [sys.executable, "-m", "fedsim.cli"]
    subprocess.run([*fedsim, *SWEEP.split(), f"out={root}", "name=tiny"], check=True, capture_output=True)
    subprocess.run([*fedsim, "report", str(root / "tiny")], check=True, capture_output=True)
    return root / "tiny"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    place = Path(os.environ.get("FEDSIM_SCREENSHOTS") or tmp_path_factory.mktemp("pictures"))
    place.mkdir(parents=True, exist_ok=True)
    return place


@pytest.fixture
def page(tmp_path):
    with browser(tmp_path / "profile") as found:
        yield found


def test_the_report(sweep, pictures, page):
    address = (sweep / "report" / "report.html").as_uri()
    page.open(address)
    page.screenshot(pictures / "light.png")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.run(paper) == "rgb(255, 255, 255)"
    assert page.run("[...document.images].every((i) => i.complete && i.naturalWidth > 0 && i.alt)")
    assert page.run("document.images.length") >= 8

    page.press("Tab")
    assert page.run("document.activeElement.textContent") == "Skip to the results"
    for _ in range(40):
        page.press("Tab")
        if page.run("document.activeElement.className") == "sort":
            break
    name = page.run("document.activeElement.textContent")
    page.press("Enter")
    assert page.run("document.activeElement.parentNode.getAttribute('aria-sort')") == "ascending"
    assert page.run("document.activeElement.textContent") == name
    page.press("Enter")
    assert page.run("document.activeElement.parentNode.getAttribute('aria-sort')") == "descending"
    assert page.run(
        "[...document.querySelectorAll('#results tbody th')].map((c) => c.textContent)"
    ) == sorted(
        page.run("[...document.querySelectorAll('#results tbody th')].map((c) => c.textContent)"),
        reverse=True,
    )

    page.run("document.getElementById('theme').click()")
    assert page.run(paper) == "rgb(20, 24, 30)"
    page.open(address)  # the choice is remembered
    assert (
        page.run(paper) == "rgb(20, 24, 30)"
        and page.run("document.getElementById('theme').textContent") == "Light"
    )
    page.pdf(pictures / "print.pdf")
    page.run("localStorage.clear()")
    page.open(address, dark=True)
    assert page.run(paper) == "rgb(20, 24, 30)"
    page.screenshot(pictures / "dark.png")
    page.open(address, width=400)
    assert page.run("document.documentElement.scrollWidth") <= 400
    page.screenshot(pictures / "narrow.png")
    assert page.errors == []
    assert {address, *(a for a in page.asked if a.startswith("data:"))} == set(page.asked)


def test_the_live_view_follows_without_losing_its_place(sweep, pictures, page):
    command = [sys.executable, "-m", "fedsim.cli", "report", str(sweep), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().split()[1]
            page.open(address)
            page.screenshot(pictures / "live.png")
            assert "4 done" in page.run("document.getElementById('runs').textContent")
            page.run("scrollTo(0, 700)")
            place = page.run("scrollY")
            run = next(sweep.glob("fedavg-s0-*"))
            with (run / "metrics.jsonl").open("a") as rows:
                last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
                rows.write(json.dumps({**last, "round": 4, "accuracy": 0.999}) + "\n")
            (run / "summary.json").rename(run / "summary.kept")
            assert _within(
                90, lambda: "1 interrupted" in page.run("document.getElementById('runs').textContent")
            )
            assert _within(
                90,
                lambda: (
                    "interrupted after 4" in page.run("document.body.innerText")
                    or "unfinished after 4" in page.run("document.body.innerText")
                ),
            )
            assert place > 0 and page.run("scrollY") == place
            page.screenshot(pictures / "live-changed.png")
            assert page.errors == []
            assert {a for a in page.asked if not a.startswith(("data:", address))} == set()
        finally:
            process.kill()
            for kept in sweep.glob("*/summary.kept"):
                kept.rename(kept.with_name("summary.json"))


def _within(seconds, true):
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.5)
    return found
