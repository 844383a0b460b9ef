"""The QC page of a store: what it counts, what leads it, whom it shows first; nothing on it can run or leak."""

import base64
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_brainscale, write_tiny_store

from brainscale import qc, qc_figures, store
from brainscale.prep_plan import Plan
from brainscale.provenance import write_text
from brainscale.qc_scans import Scans, unusual

EVIL = "<script>alert(1)</script>"


def page_of(path: Path) -> str:
    return qc.write(path).read_text(encoding="utf-8")


def odd(record):
    """Row 3 is cropped, row 6 has half the usual foreground, row 8 carries a hostile name."""
    if record["row"] == 3:
        record.update(cropped_fraction=0.12, status="warning", warnings=["cropped"])
    if record["row"] == 6:
        record["foreground_fraction"] *= 0.5
    if record["row"] == 8:
        record.update(id=EVIL, source=f"{EVIL}/x.nii")
    record["skull_stripped"] = record["row"] != 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_store(tmp_path_factory.mktemp("stores") / "odd", change=odd)


@pytest.fixture(scope="module")
def page(path):
    return page_of(path)


def test_cropping_leads_and_sections_follow(page):
    places = [page.index(f'<section id="{name}">') for name in ("cropping", "refused", "warnings", "distributions")]
    assert places == sorted(places) and page.index('<section id="pictures">') > places[-1]
    assert re.search(r"1 scan \(10\.0 %\)</b> lost more than 1 %", page)
    assert "the most is 12.0 %" in page
    first = page[page.index('<section id="cropping">') :]
    assert re.search(r'<td class="id">(.+?)</td>', first).group(1) == "sub-01_ses-1_T1w"


def test_unusual_scans_come_first_with_their_reason(page, path):
    scores, reasons = unusual(Scans(store.open_store(path)))
    assert np.argsort(-scores)[0] == 3 and scores[3] > 3.5 and scores[6] > 3.5
    assert (np.delete(scores, [3, 6]) < 3.5).all()
    assert "foreground 0.5× the usual" in reasons[6] and "cropped 12.0 % (usually 0.0 %)" in reasons[3]
    cards = re.findall(r'<figure class="scan".*?<b>(.*?)</b>', page, re.S)
    assert cards[:2] == ["sub-01_ses-1_T1w", "sub-03_ses-0_T1w"] and len(cards) == 10


def test_names_are_escaped_and_only_the_page_s_own_script_may_run(page):
    assert EVIL not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<script>") == 1
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page).group(1)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_faces_are_named_only_where_there_are_some(page, tmp_path):
    assert "1 of 10 scans is not skull-stripped: these pictures may show recognisable faces" in page
    assert "recognisable faces" not in page_of(write_tiny_store(tmp_path / "stripped"))


def test_equal_stores_give_equal_pages(path, page, tmp_path):
    other = shutil.copytree(path, tmp_path / "another name")
    assert page_of(other) == page == page_of(path)
    assert str(path) not in page and "another name" not in page
    assert store.damage(path, deep=True) == []


@pytest.mark.parametrize(("orientation", "axial"), [("RAS", "LRAP"), ("LPI", "RLAP")])
def test_pictures_stand_upright_and_say_which_side_is_which(orientation, axial):
    """A bright corner at right-anterior-superior is found where the letters say, however the axes are stored."""
    volume, cells = np.zeros((16, 16, 16), np.int16), np.full((4, 4, 4), 255, np.uint8)
    right, front, top = (slice(8, 16) if letter in "RAS" else slice(0, 8) for letter in orientation)
    volume[top, front, right] = 100
    planes = qc_figures.three_planes(volume, cells, (0, 100), (1, 1, 1), orientation)
    found = {plane["name"]: plane for plane in planes}
    assert found["axial"]["letters"] == axial
    data = base64.b64decode(found["axial"]["uri"].split(",")[1])
    length = int.from_bytes(data[33:37], "big")
    lines = np.frombuffer(zlib.decompress(data[41 : 41 + length]), np.uint8).reshape(16, 17)[:, 1:]
    side = slice(8, 16) if axial[1] == "R" else slice(0, 8)
    assert lines[:8, side].min() == 255  # the front is at the top
    lines = lines.copy()
    lines[:8, side] = 0
    assert lines.max() == 0


def test_pictures_keep_millimetres_and_leave_wide_padding_out():
    volume, cells = np.zeros((8, 16, 32), np.int16), np.full((2, 4, 8), 255, np.uint8)
    whole = qc_figures.three_planes(volume, cells, (0, 1), (1, 2, 5), "RAS")
    assert [plane["size_mm"] for plane in whole] == [(32, 32), (32, 40), (32, 40)]
    box = (slice(0, 8), slice(4, 12), slice(8, 24))
    part = qc_figures.three_planes(volume, cells, (0, 1), (1, 2, 5), "RAS", box)
    assert [plane["size_mm"] for plane in part] == [(16, 16), (16, 40), (16, 40)]


def test_the_sides_that_were_cut_are_named(tmp_path, monkeypatch):
    """A scan stored with z upside down, 30 slices longer than the grid below and 5 above."""

    def neck(record):
        stored, source = np.eye(4), np.diag([1.0, 1.0, -1.0, 1.0])
        stored[2, 3] = 30 - 50
        record["cropped_fraction"], record["shape_source_xyz"] = 0.1, [16, 24, 51]
        record["affine_stored"], record["affine_source"] = stored.ravel().tolist(), source.ravel().tolist()

    opened = store.open_store(write_tiny_store(tmp_path / "neck", scans=1, change=neck))
    scans = Scans(opened)
    assert scans.outside_low_mm.tolist() == [[0, 0, 30]] and scans.outside_high_mm.tolist() == [[0, 0, 5]]
    assert qc.cut_sides(opened, scans, 0) == []  # no cell at the grid's faces is full of foreground
    monkeypatch.setattr(qc, "FULL_CELL", 50)
    assert qc.cut_sides(opened, scans, 0) == [("I", 30.0), ("S", 5.0)]


def test_lists_of_refusals_are_cut_and_names_that_are_no_text_do_not_break_the_page(tmp_path, monkeypatch):
    def refuse(record):
        row = record["row"]
        record["contrast"] = f"<c{row}>"
        if row in (1, 4, 7, 9):
            reason = "rgb" if row == 4 else "gzip_crc"
            record.clear()
            record.update(
                row=row, id=f"r{row}", status="refused", reason=reason, sentence=f"{row} & so", source="\udce9"
            )

    monkeypatch.setattr(qc, "MAX_LISTED", 5)  # two for each of two reasons
    page = page_of(write_tiny_store(tmp_path / "refused", change=refuse))
    refused = page[page.index('<section id="refused">') : page.index('<section id="warnings">')]
    assert re.findall(r'<td class="n">(\d+)</td><td><code>(\w+)', refused) == [("3", "gzip_crc"), ("1", "rgb")]
    assert qc.REFUSED["gzip_crc"] in refused
    assert re.findall(r'<td class="words">(\d &amp; so)</td>', refused) == ["1 &amp; so", "7 &amp; so", "4 &amp; so"]
    assert "and 1 more with <code>gzip_crc</code> in refused.jsonl" in refused and "\\udce9" in refused
    assert 'class="legend"' in page and "&lt;c3&gt;" in page and "<c3>" not in page


def test_more_contrasts_than_colours_are_pooled(tmp_path):
    path = write_tiny_store(tmp_path / "many", change=lambda record: record.update(contrast=f"c{record['row']}"))
    found = qc.distributions(Scans(store.open_store(path)))
    assert found["legend"] == [] and {row["contrast"] for row in found["table"]} == {"all"}
    assert len(qc_figures.COLOURS) < 10


def test_thousands_of_scans_make_a_page_that_opens(tmp_path):
    plan = Plan(grid_voxels_xyz=(16, 24, 16), shard_volumes=500)
    page = page_of(write_tiny_store(tmp_path / "large", scans=3000, plan=plan))
    assert len(page.encode()) < 6_000_000
    assert page.count('<figure class="scan"') == qc.MAX_PICTURED
    assert "240 of 3,000 scans" in page


def test_one_scan_is_enough(tmp_path):
    page = page_of(write_tiny_store(tmp_path / "single", scans=1))
    assert page.count('<figure class="scan"') == 1 and "none is unusual" in page


def test_every_code_of_the_reader_has_its_words_on_the_page_and_in_the_readme():
    text = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "data_prep").glob("*.py"))
    refused = set(re.findall(r'Refused\(\s*"([a-z0-9_]+)"', text)) | set(re.findall(r'code="([a-z0-9_]+)"', text))
    warned = set(re.findall(r'warnings\.append\(\s*f?"([a-z_]+)', text)) | {"duplicate_of"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(refused) > 12 and len(warned) > 8
    assert not refused - set(qc.REFUSED) and not warned - set(qc.WARNINGS)
    assert not [code for code in (*qc.REFUSED, *qc.WARNINGS) if f"`{code}`" not in readme and f"`{code}:" not in readme]


def test_the_command_writes_a_store_s_page(path):
    done = run_brainscale("report", path)
    assert done.stdout.strip() == f"{path}.qc.html" and Path(f"{path}.qc.html").is_file()


def test_pages_written_at_once_do_not_harm_each_other(tmp_path):
    """Tasks of an array that end together all find the store finished, and all write its page."""
    out, text = tmp_path / "page.html", "x" * 100_000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write_text(out, text), range(400)))
    assert out.read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
