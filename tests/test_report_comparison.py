"""The page of `compare`: both tables, the words of their differences, names as text, what is no such file."""

import json
import re

import pytest
from test_report import EVIL, assert_only_our_script, text_of

from brainscale import report_comparison
from brainscale.settings import InputError

ARMS = ("mae", "mae_spectral", "jepa", "jepa_vcr")


def record():
    """compare.json of four arms on two tasks; jepa_vcr leads on the first by samples, and nothing by FLOPs."""
    tables, paired = {}, {}
    for key, lead in (("equal_samples", 0.1), ("equal_flops", 0.01)):
        level = {"mae": 0.7, "mae_spectral": 0.7, "jepa": 0.69, "jepa_vcr": 0.7 + lead, "random": 0.61}
        tables[key] = [
            {"task": task, "arm": arm, "metric": "auroc", "value": level[arm], "low": level[arm] - 0.06,
             "high": level[arm] + 0.06, "seeds": 3, "test_subjects": 60}
            for task in ("ventricles", "lesions") for arm in level
        ]  # fmt: skip
        paired[key] = [
            {"task": "ventricles", "a": a, "b": b, "difference": level[a] - level[b],
             "low": level[a] - level[b] - 0.05, "high": level[a] - level[b] + 0.05,
             "p": 0.01 if abs(level[a] - level[b]) > 0.05 else 0.6}
            for at, a in enumerate(ARMS) for b in ARMS[at + 1 :]
        ]  # fmt: skip
    return {
        "schema": 1, "arms": list(ARMS), "seeds": [0, 1, 2], "probe": "linear", "batch_volumes": 8, "planted": True,
        "flops_per_sample": dict.fromkeys(ARMS, 2e9), "tables": tables, "paired": paired,
        "steps": {key: dict.fromkeys(ARMS, 500) for key in tables},
    }  # fmt: skip


def written(folder, data):
    (folder / "compare.json").write_text(json.dumps(data))
    return report_comparison.write(folder).read_text(encoding="utf-8")


def test_both_tables_and_their_words(tmp_path):
    page = written(tmp_path, record())
    text = text_of(page)
    assert "4 objectives side by side" in text and "effects planted into synthetic brains" in text
    top = page.partition("<h2>Equal samples seen</h2>")[0]
    items = [text_of(item).strip() for item in re.findall(r"<li class=.*?</li>", top, re.S)]
    assert items[0] == (
        "ventricles: mae is worse than jepa_vcr: difference in AUROC −0.100 [−0.150, −0.050], p = 0.010."
    )
    assert items[3] == "3 of 6 paired comparisons leave it open which objective is better."
    assert items[4:] == ["6 of 6 paired comparisons leave it open which objective is better."]
    assert "mae 500 4,000 8e+12" in text
    assert "ventricles jepa_vcr AUROC 0.800 [0.740, 0.860] 3 60" in text
    assert "ventricles mae jepa_vcr −0.100 [−0.150, −0.050] 0.010 b is better" in text
    assert "ventricles mae jepa +0.010 [−0.040, +0.060] 0.600 not told apart" in text
    assert page.count('<tr class="baseline">') == 4 and text.count("random") == 8
    assert_only_our_script(page)


def test_names_are_text_and_the_bytes_the_same(tmp_path):
    text = json.dumps(record()).replace("jepa_vcr", EVIL).replace("lesions", f"{EVIL}2")
    page = written(tmp_path, json.loads(text))
    assert EVIL not in page and "&lt;script&gt;" in page and page == written(tmp_path, json.loads(text))


def test_what_is_missing_and_what_is_none(tmp_path):
    data = record()
    data["paired"] = {}
    assert "No objectives were compared in pairs." in text_of(written(tmp_path, data))
    assert "The file has no table." in text_of(written(tmp_path, {"schema": 1, "arms": [], "tables": {}}))
    for content, sentence in (("{", "not valid JSON"), ('{"schema": 2}', "is not what `brainscale compare` writes")):
        (tmp_path / "compare.json").write_text(content)
        with pytest.raises(InputError, match=sentence):
            report_comparison.write(tmp_path)
