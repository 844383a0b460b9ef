"""Several runs side by side: the table, what can be concluded, links, names that are evil or equal, mistakes."""

import html
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urljoin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import EVIL, assert_only_our_script, text_of
from test_report_health import BOTH, HEALTHY, RANK, SENTENCE, page_of, write_run

from brainscale import cli, report_compare
from brainscale.settings import InputError


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(folder, page) that sets a MAE beside a JEPA whose name is evil."""
    root = tmp_path_factory.mktemp("several")
    mae = write_run(root / "runs" / "mae", "mae")
    probes = {0: {}, 20: BOTH, 60: RANK}
    jepa = write_run(root / "runs" / "a:b <b> $x$", probes=probes, hash_of_data="d2", train={"num_steps": 100})
    page_of(mae), page_of(jepa)
    (root / "pages").mkdir()
    return root, report_compare.write([mae, jepa], root / "pages" / "all.html").read_text(encoding="utf-8")


def test_a_row_for_every_run(compared):
    text = text_of(compared[1])
    assert (
        "mae MAE spectral term, λ 0.01 60 × 8 volumes 1 min 30 s 1.2 M width 128 0.5085 0.5000 61.2 random 81.5 0.125 "
        "0.800 0.750 4 none" in text
    )
    assert (
        "a:b <b> $x$ JEPA VCR, weight 1 60 of 100 × 8 volumes 1 min 30 s 1.2 M width 128 0.6102 0.6000 20.0 random "
        "81.5 0.125 0.800 0.750 4 rank" in text
    )
    assert f"a:b <b> $x$ Steps 20 to 60, and still at the latest probe: {SENTENCE}. Step 20, no longer" in text


def test_what_can_be_concluded_is_said(compared, tmp_path):
    text = text_of(compared[1])
    assert "Losses are not comparable between objectives" in text and "detection" in text
    assert "The runs were not trained on the same scans" in text
    same = [write_run(tmp_path / name, width_of) for name, width_of in (("a", "jepa"), ("b", "jepa"))]
    text = text_of(report_compare.write(same, tmp_path / "all.html").read_text())
    assert "All runs were trained on the same scans" in text and "not comparable between objectives" not in text
    assert "those of two JEPA runs do not" in text and "another width" not in text
    shutil.rmtree(same[0] / "checkpoints")
    wide = write_run(tmp_path / "c", model={"width": 256})
    text = text_of(report_compare.write([*same, wide], tmp_path / "all.html").read_text())
    assert "is not known: not all of them have saved a checkpoint" in text and "another width or patch size" in text


def test_names_are_escaped_and_no_curve_holds_them(compared):
    page = compared[1]
    assert "<b> $x$" not in page and EVIL not in page and "&lt;b&gt; $x$" in page
    assert not any("$x$" in svg or "mae" in svg for svg in re.findall(r"<svg.*?</svg>", page, re.S))


def test_links_are_relative_and_lead_to_the_pages(compared):
    root, page = compared
    links = [html.unescape(link) for link in re.findall(r'<a href="([^"]*)"', page)]
    base = "http://host/pages/all.html"
    found = [unquote(urljoin(base, link)).removeprefix("http://host/") for link in links]
    assert found == ["runs/mae/report.html", "runs/a:b <b> $x$/report.html"]
    assert all((root / path).is_file() for path in found)


def test_a_run_without_a_page_is_not_linked(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    page = report_compare.write(runs, tmp_path / "all.html").read_text()
    assert "<a " not in page and "A name without a link has no page yet" in page


def test_it_is_one_file_and_the_same_bytes_twice(compared):
    root, page = compared
    runs = [root / "runs" / "mae", root / "runs" / "a:b <b> $x$"]
    again = report_compare.write(runs, root / "pages" / "all.html")
    assert again.read_text(encoding="utf-8") == page and [p.name for p in again.parent.iterdir()] == ["all.html"]
    assert_only_our_script(page)
    targets = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert {target[1:] for target in targets if target.startswith("#")} <= set(re.findall(r'\bid="([^"]+)"', page))
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert [title.partition(" ")[0] for title in titles] == ["effective", "gap:", "error", "median", "million"]


def test_every_run_has_its_own_line(compared):
    for style in (colour for colour, _ in report_compare.STYLES[:2]):
        assert all(f"stroke: {style}" in svg for svg in re.findall(r"<svg.*?</svg>", compared[1], re.S))
        assert compared[1].count(f"border-top-color:{style}") == 2
    assert len(set(report_compare.STYLES)) == len(report_compare.STYLES)


def test_runs_of_the_same_name_stay_apart(tmp_path):
    runs = [write_run(tmp_path / place) for place in ("x/run", "y/run", "other")]
    page = report_compare.write(runs, tmp_path / "all.html").read_text()
    assert all(page.count(f">{name}<") == 2 for name in ("x/run", "y/run", "other"))


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=2, max_size=6, unique_by=tuple))
def test_names_are_distinct_ends_of_their_paths(folders):
    places = ["/" + "/".join(parts) for parts in folders]
    names = report_compare.distinct(places)
    assert len(set(names)) == len(names) and all(place.endswith(name) for place, name in zip(places, names))


def test_unreadable_checkpoints_leave_the_parameters_unknown(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    (runs[0] / "checkpoints" / "step-00000060" / "weights.safetensors").write_bytes(b"torn")
    text = text_of(report_compare.write(runs, tmp_path / "all.html").read_text())
    assert text.count("1.2 M width") == 1 and "– width 128" in text


def test_many_runs_are_too_many(tmp_path):
    with pytest.raises(InputError, match="19 runs are too many to tell apart; give at most 18"):
        report_compare.write([Path(f"run{i}") for i in range(19)], tmp_path / "all.html")


def test_numbers_that_are_not_finite_are_not_drawn(tmp_path):
    broken = {name: float("nan") for name in HEALTHY if not name.startswith("probe_")}
    runs = [write_run(tmp_path / "broken", probes={0: broken, 20: broken, 60: broken}), write_run(tmp_path / "whole")]
    page = report_compare.write(runs, tmp_path / "all.html").read_text()
    assert not re.search(r"\bnan\b", page, re.I) and "– random – – – –" in text_of(page)


def sentence(capsys, *arguments):
    """The one sentence of a command that is refused."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_mistakes_are_one_sentence(tmp_path, capsys):
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    (tmp_path / "empty").mkdir()
    out = tmp_path / "all.html"
    assert "say where with --out FILE.html" in sentence(capsys, "report", one, two)
    assert "no run folder: it has no config.toml" in sentence(capsys, "report", one, tmp_path / "empty", "--out", out)
    assert "no run folder" in sentence(capsys, "report", one, tmp_path / "absent", "--out", out)
    assert "is given twice" in sentence(capsys, "report", one, two, tmp_path / "two" / "..", one, "--out", out)
    assert "--out is for several runs" in sentence(capsys, "report", one, "--out", out)
    for wrong in (tmp_path / "all.txt", tmp_path / "absent" / "all.html"):
        assert "cannot be the page" in sentence(capsys, "report", one, two, "--out", wrong)
    assert "is the page of one of the runs" in sentence(capsys, "report", one, two, "--out", two / "report.html")
    assert not out.exists() and not (two / "report.html").exists()


def test_the_command_writes_and_names_the_page(tmp_path, capsys):
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(one), str(two), "--out", str(tmp_path / "all.html")])
    assert not ended.value.code and capsys.readouterr().out.strip() == str(tmp_path / "all.html")
    assert "2 runs side by side" in (tmp_path / "all.html").read_text()
