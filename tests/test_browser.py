"""The pages in a real browser: nothing on the console, every picture there, nothing cut off, tables that sort."""

import io
import json
import re
import shutil

import browser as chromium
import pytest
from conftest import write_tiny_store
from matplotlib.image import imread
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from test_qc import odd
from test_report_comparison import record as comparison
from test_report_evaluation import record
from test_report_health import write_run

from brainscale import qc, report, report_compare, report_comparison, report_evaluation

pytestmark = pytest.mark.slow

UNLOADED = "return Array.from(document.images).filter(i => !i.complete || !i.naturalWidth).map(i => i.alt)"
EMPTY = """return Array.from(document.querySelectorAll("svg")).filter(svg => {
  const box = svg.getBoundingClientRect(); return !svg.closest("details:not([open])") && (!box.width || !box.height);
}).length"""
TOO_WIDE = """const width = document.documentElement.clientWidth;
return [document.documentElement.scrollWidth > width ? "page" : null].concat(
  Array.from(document.querySelectorAll("body *"), node => {
    if (node.closest(".wide, pre, svg, details:not([open])")) return null;
    return node.getBoundingClientRect().right > width + 1 ? node.outerHTML.slice(0, 200) : null;
  })).filter(found => found)"""
CUT = """return Array.from(document.querySelectorAll("svg:not(.bar)")).flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return Array.from(svg.querySelectorAll("text"), text => {
    const own = text.getBoundingClientRect();
    const out = Math.max(box.left - own.left, own.right - box.right, box.top - own.top, own.bottom - box.bottom);
    return out > 2 && own.width ? text.textContent + " by " + out.toFixed(1) : null;
  });
}).filter(found => found)"""
OPEN = "for (const part of document.querySelectorAll('details')) part.open = true"


@pytest.fixture(scope="module")
def window():
    with chromium.running() as found:
        yield found


@pytest.fixture(scope="module")
def pages(unbroken, tmp_path_factory):
    """Name → page: of a real run with scores, of two runs side by side, of an evaluation, of a store."""
    folder = tmp_path_factory.mktemp("pages")
    run = shutil.copytree(unbroken, folder / "run")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "scores.json").write_text(json.dumps(record()))
    probes = [{"step": step, "probe_auroc": 0.5 + step / 200} for step in (0, 20, 40, 60)]
    runs = [write_run(folder / "mae", "mae"), write_run(folder / "a much longer name of a run, jepa", lines=probes)]
    (folder / "compare.json").write_text(json.dumps(comparison()))
    store = write_tiny_store(folder / "store", change=odd)
    return {
        "run": report.write(run),
        "jepa": report.write(runs[1]),
        "compare": report_compare.write([*runs, run], folder / "runs.html"),
        "evaluation": report_evaluation.write(run / "evaluation"),
        "comparison": report_comparison.write(folder / "compare.json"),
        "qc": qc.write(store),
    }


NAMES = ("run", "jepa", "compare", "evaluation", "comparison", "qc")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_opens_whole_and_alone(name, pages, window):
    chromium.open_page(window, pages[name])
    window.execute_script(OPEN)
    assert window.find_elements(By.TAG_NAME, "svg") or window.find_elements(By.TAG_NAME, "img")
    assert window.execute_script(UNLOADED) == [] and window.execute_script(EMPTY) == 0
    assert chromium.complaints(window) == []
    loaded = [url for url in chromium.requests(window) if not url.startswith("data:")]
    assert loaded == [pages[name].absolute().as_uri()]


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cut_off_or_too_wide(name, width, pages, window):
    chromium.open_page(window, pages[name], width)
    window.execute_script(OPEN)
    picture = imread(io.BytesIO(chromium.screenshot(window, f"{name}-{width}")))
    assert picture.shape[1] == width and picture.shape[0] > 900 and picture[..., :3].std() > 0.01
    assert window.execute_script(TOO_WIDE) == []
    assert window.execute_script(CUT) == []


def test_the_table_of_runs_needs_no_scrolling_on_a_wide_screen(pages, window):
    chromium.open_page(window, pages["compare"])
    broad = window.find_element(By.CSS_SELECTOR, ".broad")
    assert broad.get_property("scrollWidth") == broad.get_property("clientWidth")


def test_dark_pages_are_dark(pages, window):
    for name in NAMES:
        chromium.open_page(window, pages[name], 1280, dark=True)
        picture = imread(io.BytesIO(chromium.screenshot(window, f"{name}-dark")))
        assert picture[:50, :50, :3].mean() < 0.2


def number(cell):
    """What a cell of numbers is sorted by; None where it has none."""
    text, value = cell
    text = (text if value is None else value).replace(",", "").replace("−", "-").replace("< ", "")
    found = re.match(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", text)
    return float(found.group()) if found else None


@pytest.mark.parametrize("name", NAMES)
def test_tables_sort_either_way(name, pages, window):
    chromium.open_page(window, pages[name])
    window.execute_script(OPEN)
    sorted_columns = 0
    for table in window.find_elements(By.TAG_NAME, "table"):
        heads = table.find_elements(By.CSS_SELECTOR, "thead th")
        before = chromium.cells(window, table)
        if not heads or len(before) < 2:
            continue
        whole = [row for row in before if len(row) == len(heads)]
        for at, head in enumerate(heads):
            if not head.text:
                continue
            button = head.find_element(By.TAG_NAME, "button")
            for way in ("ascending", "descending"):
                window.execute_script("arguments[0].click()", button)
                assert head.get_attribute("aria-sort") == way
                assert len(table.find_elements(By.CSS_SELECTOR, "th[aria-sort]")) == 1
                after = chromium.cells(window, table)
                assert sorted(map(str, after)) == sorted(map(str, before))
                column = [row[at] for row in after if len(row) == len(heads)]
                assert len(column) == len(whole)
                if "n" in head.get_attribute("class").split():
                    found = [number(cell) for cell in column]
                    known = [value for value in found if value is not None]
                    assert known == sorted(known, reverse=way == "descending")
                    assert found[len(known) :] == [None] * (len(found) - len(known)), "what has no number comes last"
                    sorted_columns += len(set(known)) > 1
    assert sorted_columns or name == "qc"


def test_a_table_sorts_by_numbers_and_by_keyboard(pages, window):
    chromium.open_page(window, pages["evaluation"])
    table = window.find_element(By.CSS_SELECTOR, "table.scores")
    head = table.find_element(By.XPATH, ".//th[.='AUROC']")
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    scores = [s for s in record()["tasks"][0]["scores"] if s["metric"] == "auroc"]
    order = [s["encoder"] for s in sorted(scores, key=lambda s: s["value"])]
    assert [row[0][0] for row in chromium.cells(window, table)] == order
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    assert [row[0][0] for row in chromium.cells(window, table)] == order[::-1]


def test_the_filter_of_pictures_still_works(pages, window):
    chromium.open_page(window, pages["qc"])
    window.find_element(By.ID, "find").send_keys("cropped")
    shown = [card for card in window.find_elements(By.CSS_SELECTOR, "#pictures .scan") if card.is_displayed()]
    assert len(shown) == 1 and "sub-01_ses-1_T1w" in shown[0].text
