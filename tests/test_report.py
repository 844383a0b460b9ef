"""The report: what it says, that it is one file, that it survives a young or torn run folder, the same bytes twice."""

import base64
import hashlib
import html
import io
import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.image import imread

from brainscale import figures, report
from brainscale.config import Config
from brainscale.settings import InputError, to_toml

STEPS, EVALUATED = 60, (20, 40, 60)
MEANS = {"own": 0.24, "neighbours": 0.32, "average": 0.20, "swapped": 0.30}
EVIL = "<script>alert(1)</script>"


def metrics_lines():
    lines = []
    for step in range(1, STEPS + 1):
        lines.append({
            "step": step, "loss": 1 / step, "pixel_loss": 0.9 / step, "spectral_loss": 2 / step, "lr": 1e-3,
            "grad_norm": 0.5, "samples": 4 * step, "mask_fraction": 0.75, "time_s": 1.5 * step, "step_s": 1.5,
            "data_s": 0.01, "data_wait_fraction": 0.01, "checkpoint_s": 0.0, "voxels_per_s": 4e6, "mfu": None,
        })  # fmt: skip
        if step in EVALUATED:
            held = 1.1 / step
            lines.append({
                "step": step, "holdout_loss": held, "holdout_pixel_loss": held, "holdout_spectral_loss": held,
            })  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines)


def evaluation(rng):
    """Two volumes of 16 × 24 × 8 voxels (x, y, z), every second band of 4 columns masked, as from holdout.py."""
    arrays = {
        "cycles_per_voxel": (np.arange(40) + 0.5) / 80,
        "power": rng.uniform(0.1, 1, (3, 40)),
        "rows": np.array([3, 5]),
        "ids": np.array(["sub-03_T1w", "sub-05_T1w"]),
    }
    for i in range(2):
        for plane, shape in (("axial", (24, 16)), ("coronal", (8, 16)), ("sagittal", (8, 24))):
            true, mosaic = rng.normal(0, 0.1, (2, *shape))
            true[0, 0] = mosaic[0, 0] = 3
            masked = np.arange(shape[1]) // 4 % 2 == 1
            hidden, seen = np.where(masked, np.nan, true), np.where(masked, mosaic, np.nan)
            stacked = np.stack([true, hidden, seen, np.where(masked, mosaic, true)])
            arrays[f"{plane}_{i}"] = stacked.astype(np.float16)
    return arrays


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, with its report; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    (folder / "holdout").mkdir(parents=True)
    config = Config.model_validate({"train": {"num_steps": STEPS}, "optim": {"warmup_steps": 5}})
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "metrics.jsonl").write_text(metrics_lines())
    rng = np.random.default_rng(0)
    for step in EVALUATED:
        np.savez_compressed(folder / "holdout" / f"step-{step:08d}.npz", **evaluation(rng))
    refused = [
        {"row": 7, "id": EVIL, "status": "refused", "reason": "not_3d", "sentence": "4 axes & no more", "source": "x"},
        {"row": 9, "id": "sub-09", "status": "refused", "reason": "empty", "sentence": "constant", "source": "y"},
    ]
    about = {
        "utc": "2026-01-01T10:00:00+00:00", "commit": "0123456789abcdef", "versions": {"torch": "2.11.0"},
        "machine": {"cpu": "x86_64", "device": "cpu (2 threads)"}, "world_size": 2, "launcher": "torchrun",
        "store": {
            "path": "stores/brains", "plan": {"spacing_mm_xyz": [1.0, 2.0, 4.0]}, "plan_hash": "ab" * 16,
            "volume_zyx": [8, 24, 16], "scans": 12, "training_scans": 10, "held_out_scans": 2, "held_out_ids": [],
            "not_skull_stripped": 3, "refused": 2, "refused_by_reason": {"not_3d": 1, "empty": 1},
            "refused_scans": refused,
        },
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about))
    # Volume 3 is a little below the mean everywhere, volume 5 above; on 5 the swapped tokens do better.
    cases = []
    for row, mask in itertools.product((3, 5), range(4)):
        sign = -1 if row == 3 else 1
        errors = {name: mean + sign * (0.1 if name == "own" else 0.02) for name, mean in MEANS.items()}
        cases.append({"row": row, "mask": mask, **errors})
    record = {"volumes": 2, "errors": MEANS, "cases": cases}
    (folder / "reconstruction.json").write_text(json.dumps(record))
    exit_record = {"code": 0, "sentence": "done", "utc": "2026-01-01T10:05:00+00:00"}
    (folder / "exit.json").write_text(json.dumps(exit_record))
    (folder / "profile").mkdir()
    (folder / "profile" / "steps-000007-000009.txt").write_text("steps 7 to 9, 5.00 ms each, of rank <0>\n\nphase …\n")
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def page(finished):
    return (finished / "report.html").read_text(encoding="utf-8")


def test_a_profile_is_shown(page):
    assert "<summary>Profile: steps 7 to 9 by phase</summary><pre>steps 7 to 9, 5.00 ms each, of rank &lt;0&gt;" in page


def test_a_page_that_may_show_faces_says_so(page, finished, tmp_path):
    sentence = "3 of the store’s 12 scans are not skull-stripped: these pictures may show recognisable faces."
    assert sentence in page
    stripped = shutil.copytree(finished, tmp_path / "stripped")
    about = json.loads((stripped / "run.json").read_text())
    about["store"]["not_skull_stripped"] = 0
    (stripped / "run.json").write_text(json.dumps(about))
    assert "recognisable faces" not in report.write(stripped).read_text(encoding="utf-8")


def test_letters_follow_the_orientation_of_the_store():
    assert [figures.letters(plane, "RAS") for plane in figures.PLANES] == ["LRAP", "LRSI", "PASI"]
    assert [figures.letters(plane, "LPI") for plane in figures.PLANES] == ["RLPA", "RLIS", "APIS"]


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "demo")


@pytest.fixture
def quick_run_dir(run_dir):
    """Without what takes long to draw."""
    shutil.rmtree(run_dir / "holdout")
    (run_dir / "metrics.jsonl").write_text("")
    return run_dir


def written(run_dir):
    return report.write(run_dir).read_text(encoding="utf-8")


def text_of(page):
    """The page without tags, styles and pictures, white space collapsed."""
    page = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", page, flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))


def assert_only_our_script(page):
    """One script, and a policy that lets nothing else run or load."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 1 == page.lower().count("<script") and "<link" not in page.lower()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page).group(1)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy and policy.endswith(f"script-src 'sha256-{digest}'")


def picture(page, alt):
    """RGB values 0..1 of the first picture with this alternative text."""
    uri = re.search(rf'src="data:image/png;base64,([^"]+)" alt="{alt}"', page).group(1)
    return imread(io.BytesIO(base64.b64decode(uri)))[..., :3]


def test_the_four_errors_and_their_reading(page):
    text = text_of(page)
    for mean in MEANS.values():
        assert f"{mean:.4f}" in text
    assert "The model's error is 25.0 % lower than the neighbour mean." in text
    assert "It is 20.0 % higher than the average training brain: answering the average brain" in text
    assert "Own tokens are 20.0 % better than another subject's: the model uses what it sees." in text
    assert "of 2 held-out volumes (8 masks in all)" in text
    assert "model, own tokens 0.2400 0.1000" in text
    assert "model, another's tokens 0.3000 0.0200 20.0 % lower 1 of 2" in text


@pytest.mark.parametrize(
    ("swapped", "verdict"),
    [
        (0.245, "Own tokens are 2.0 % better than another subject's: the model hardly uses what it sees"),
        (0.20, "Own tokens are 20.0 % worse than another subject's: the model does not use what it sees"),
        (None, "Whether the model uses what it sees is not known"),
    ],
)
def test_what_swapped_tokens_mean(quick_run_dir, swapped, verdict):
    file = quick_run_dir / "reconstruction.json"
    record = json.loads(file.read_text())
    for errors in (record["errors"], *record["cases"]):
        errors["swapped"] = swapped
        if swapped is None:
            del errors["swapped"]
    file.write_text(json.dumps(record))
    assert verdict in text_of(written(quick_run_dir))


def test_the_header_and_the_data(page):
    text = text_of(page)
    assert "60 of 60, 1 min 30 s of training" in text
    assert "state done" in text
    assert "0123456789ab" in text and "cpu (2 threads), 2 ranks (torchrun)" in text
    assert "12: 10 for training, 2 held out" in text
    assert "1 not_3d" in text and "1 empty" in text
    assert f"{1.1 / 60:.4f} held-out loss at step 60" in text


def test_it_is_one_file_that_runs_no_script_but_its_own(page):
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import\s*(\S+)""", page)
    targets = ["".join(found) for found in links]
    assert targets and all(target.startswith(("data:image/png;base64,", "#")) for target in targets)
    assert_only_our_script(page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert {target[1:] for target in targets if target.startswith("#")} <= set(ids)
    assert len(ids) == len(set(ids))


def test_ids_and_sentences_are_escaped(page):
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "4 axes &amp; no more" in page


def test_same_folder_same_bytes(run_dir, page):
    assert written(run_dir) == page
    assert [path.name for path in run_dir.iterdir() if path.name.startswith("report")] == ["report.html"]


def test_masked_voxels_have_a_tone_of_their_own(page):
    masked, predicted, mosaic = (picture(page, f"axial, {name}") for name in ("masked", "predicted", "mosaic"))
    tone = figures.GREY.get_bad()[:3]
    hidden = np.broadcast_to(np.arange(16) // 4 % 2 == 1, (24, 16))
    for pixels, without in ((masked, hidden), (predicted, ~hidden)):
        assert np.allclose(pixels[without], tone, atol=1 / 255)
        assert np.ptp(pixels[~without], axis=-1).max() < 1e-6
    assert np.ptp(mosaic, axis=-1).max() < 1e-6 and np.ptp(tone) > 0.1 and min(tone) > 0.2


def test_slices_stand_as_they_are_stored_and_carry_letters(page):
    """holdout.py stores slices upright with x increasing to the right: the patient's left is left; voxels keep mm."""
    assert picture(page, "axial, input").shape == (24, 16, 3)
    brightest = np.unravel_index(picture(page, "axial, input")[..., 0].argmax(), (24, 16))
    assert brightest == (0, 0)
    for plane, letters, ratio in (
        ("axial", "LRAP", 16 / 48),
        ("coronal", "LRSI", 16 / 32),
        ("sagittal", "PASI", 48 / 32),
    ):
        before, after = re.search(rf'(style="[^"]*")><img [^>]* alt="{plane}, input">(.*?)</div>', page).groups()
        spans = [f'<span class="{place}">{letter}</span>' for place, letter in zip("lrtb", letters)]
        assert all(span in after for span in spans)
        assert float(re.search(r"aspect-ratio:([\d.]+)", before).group(1)) == pytest.approx(ratio, abs=1e-3)


def test_a_young_run_says_what_is_not_there(run_dir):
    for path in [*run_dir.glob("*.json"), *run_dir.glob("holdout/*")]:
        path.unlink()
    text = text_of(written(run_dir))
    assert "run.json is not there yet" in text and "No held-out evaluation yet" in text
    assert "are measured when training ends" in text
    (run_dir / "metrics.jsonl").unlink()
    text = text_of(written(run_dir))
    assert "0 of 60" in text and "No step has been logged yet" in text
    assert "no end recorded: still running, or killed" in text


def test_an_exit_record_of_an_earlier_process_is_not_this_one(quick_run_dir):
    record = {"code": 5, "sentence": "the loss at step 4 is nan", "utc": "2026-01-01T10:05:00+00:00"}
    (quick_run_dir / "exit.json").write_text(json.dumps(record))
    assert "stopped itself (exit code 5): the loss at step 4 is nan" in text_of(written(quick_run_dir))
    (quick_run_dir / "exit.json").write_text(json.dumps({**record, "utc": "2026-01-01T09:00:00+00:00"}))
    assert "no end recorded: still running, or killed" in text_of(written(quick_run_dir))


def test_a_run_that_slurm_will_continue_is_not_called_done(run_dir):
    told = "stopped by SIGUSR1 after step 60 of 100, which is saved; job 7 is queued again"
    record = {"code": 0, "sentence": told, "utc": "2026-01-01T10:05:00+00:00"}
    (run_dir / "exit.json").write_text(json.dumps(record))
    config = (run_dir / "config.toml").read_text()
    assert "num_steps = 60" in config
    (run_dir / "config.toml").write_text(config.replace("num_steps = 60", "num_steps = 100"))
    assert f"state {told}" in text_of(written(run_dir))


def test_a_torn_line_is_left_out_and_a_later_line_replaces_keys(tmp_path):
    file = tmp_path / "metrics.jsonl"
    later = '{"step": 2, "loss": 2.0, "mfu": null}'
    file.write_text(f'{{"step": 2, "loss": 3.0, "lr": 0.1}}\n{{"step": 1, "loss": 4.0}}\n{later}\n{{"step": 3, "lo')
    metrics = report.read_metrics(file)
    assert metrics == {1: {"step": 1, "loss": 4.0}, 2: {"step": 2, "loss": 2.0, "lr": 0.1, "mfu": None}}
    steps, loss = figures.series(metrics, "loss")
    assert steps.tolist() == [1, 2] and loss.tolist() == [4, 2]
    assert len(figures.series(metrics, "mfu")[0]) == 0


def test_what_cannot_be_read_is_one_sentence(run_dir, tmp_path):
    with pytest.raises(InputError, match=r"no run folder: it has no config\.toml"):
        report.write(tmp_path)
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2 is no metrics line"):
        report.write(run_dir)
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "holdout" / "step-00000060.npz").write_bytes(b"PK\x03\x04torn")
    with pytest.raises(InputError, match=r"step-00000060\.npz cannot be read"):
        report.write(run_dir)
    (run_dir / "run.json").write_text('{"utc": ')
    with pytest.raises(InputError, match=r"run\.json is not valid JSON"):
        report.write(run_dir)


def test_evaluations_shown_are_few_and_hold_first_and_last(tmp_path):
    for step in range(1, 41):
        np.savez(tmp_path / f"step-{step:08d}.npz", power=np.zeros((3, 40)))
    (tmp_path / "step-00000041.tmp.npz").write_bytes(b"being written")
    steps = [e.step for e in report.read_evaluations(tmp_path)]
    assert steps[0] == 1 and steps[-1] == 40 and len(steps) == len(set(steps)) == report.MAX_EVALUATIONS


@given(hnp.arrays(np.float64, st.integers(1, 5000), elements=st.floats(-1e6, 1e6)))
def test_thin_curves_are_short_and_keep_every_extreme(y):
    x = np.arange(len(y), dtype=float)
    for envelope in (True, False):
        thin_x, thin_y = figures.thin(x, y, envelope)
        assert len(thin_x) == len(thin_y) <= figures.MAX_POINTS and (np.diff(thin_x) >= 0).all()
    highest_lowest = figures.thin(x, y, True)[1]
    assert highest_lowest.max() == y.max() and highest_lowest.min() == y.min()


@given(hnp.arrays(np.float64, st.integers(1, 300), elements=st.floats(-1e3, 1e3)))
def test_smoothing_is_the_mean_of_the_neighbours(y):
    half = len(y) // 50
    expected = [y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))]
    assert np.allclose(figures.smooth(y), expected, atol=1e-8)


def test_values_that_are_not_finite_are_counted_not_drawn(quick_run_dir):
    lines = [{"step": step, "grad_norm": float("nan") if step < 3 else 1.0} for step in range(1, 9)]
    (quick_run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "2 values not finite" in written(quick_run_dir)


def test_no_torch():
    code = (
        "import sys, brainscale.report_compare; "
        "print([m for m in ('torch', 'zarr', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
