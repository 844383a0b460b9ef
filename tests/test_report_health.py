"""The page of a run by objective: the monitors, warnings, what a JEPA does not have. From folders written by hand."""

import html
import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_report import EVIL, picture, text_of

from brainscale import report, report_health
from brainscale.config import Config
from brainscale.settings import InputError, to_toml

STEPS, PROBED = 60, (0, 20, 40, 60)
PARTS = {
    "mae": {"loss": 0.5, "pixel_loss": 0.4, "spectral_loss": 10.0},
    "jepa": {"loss": 0.9, "prediction_loss": 0.6, "variance_loss": 0.3, "covariance_loss": 0.1, "sigreg_loss": None},
}
HEALTHY = {
    "effective_rank": 61.25, "std_low": 0.5, "std_median": 0.75, "std_high": 1.25, "lidar": 5.5, "gap": 0.125,
    "error_over_average": 0.8, "teacher_cosine": 0.875, "mask_distance_tokens": 1.5, "probe_volumes": 9,
    "probe_tokens": 1234,
}  # fmt: skip
RANDOM = {**HEALTHY, "effective_rank": 81.5, "gap": 0.001, "error_over_average": 3.5, "teacher_cosine": 1.0}
MASKED = {
    "mask_fraction": 0.5, "mask_foreground_fraction": 0.4375, "mask_blocks": 12.0, "mask_block_fraction": 0.0625,
    "mask_cell_spread": 1.125,
}  # fmt: skip
SENTENCE = f"embeddings fill 20.0 dimensions {EVIL}"


def write_run(folder, objective="jepa", probes=None, lines=(), hash_of_data="d1", **groups):
    """A run folder. probes: step → what differs from a healthy one; lines: further metric lines."""
    folder.mkdir(parents=True)
    kind = {"regularizer": {"kind": "vcr", "weight": 1.0}} if objective == "jepa" else {}
    settings = {
        "objective": objective, "train": {"num_steps": STEPS, "global_batch_volumes": 8}, "optim": {"warmup_steps": 5},
        "model": {"width": 128, "heads": 4}, "health": {"gap_after_steps": 40}, **kind,
    }  # fmt: skip
    for name, values in groups.items():
        settings[name] = {**settings.get(name, {}), **values} if isinstance(values, dict) else values
    (folder / "config.toml").write_text(to_toml(Config.model_validate(settings)))
    probes = {step: {} for step in PROBED} if probes is None else probes
    found = [{"step": step, **(HEALTHY if step else RANDOM), **change} for step, change in probes.items()]
    if objective == "mae":
        found = [{**line, "teacher_cosine": None} for line in found]
    logged = []
    for step in range(1, STEPS + 1):
        parts = {name: value and value * (1 + 1 / step) for name, value in PARTS[objective].items()}
        logged.append({"step": step, **parts, **MASKED, "lr": 1e-3, "grad_norm": 0.5, "time_s": 1.5 * step,
                       "step_s": 1.5, "data_wait_fraction": 0.01, "voxels_per_s": 4e6, "mfu": None})  # fmt: skip
    held = [{"step": step, **{f"holdout_{name}": value for name, value in list(PARTS[objective].items())[:2]}}
            for step in (30, 60)]  # fmt: skip
    every = sorted([*logged, *held, *found, *lines], key=lambda line: line["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in every))
    about = {
        "utc": "2026-01-01T10:00:00+00:00", "commit": "0123456789abcdef", "versions": {},
        "machine": {"cpu": "x86_64", "device": "cpu (2 threads)"}, "world_size": 1, "launcher": "single",
        "store": {
            "path": "stores/brains", "plan": {}, "plan_hash": "ab" * 16, "volume_zyx": [80, 96, 80], "scans": 10,
            "training_scans": 9, "held_out_scans": 1, "not_skull_stripped": 0, "refused": 0, "refused_by_reason": {},
            "refused_scans": [],
        },
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about))
    if hash_of_data:
        checkpoint = folder / "checkpoints" / "step-00000060"
        checkpoint.mkdir(parents=True)
        weights = {"encoder.a": np.zeros((1000, 1200)), "encoder.b": np.zeros(1000), "teacher.a": np.zeros(5)}
        save_file(weights, checkpoint / "weights.safetensors")
        (checkpoint / "state.json").write_text(json.dumps({"data_hash": hash_of_data}))
    return folder


def page_of(folder):
    return report.write(folder).read_text(encoding="utf-8")


def svg_under(page, title):
    return re.search(rf"<figcaption>{re.escape(html.escape(title))}</figcaption>(<svg.*?</svg>)", page, re.S).group(1)


@pytest.fixture(scope="module")
def jepa(tmp_path_factory):
    """A healthy JEPA run and its page; not to be changed."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "jepa")
    return folder, page_of(folder)


def test_a_jepa_page_speaks_of_what_a_jepa_has(jepa):
    text = text_of(jepa[1])
    assert "objective jepa · regularizer VCR, weight 1" in text
    assert "0.6102 training prediction loss, mean of the last 3 logged" in text
    assert "0.6000 held-out prediction loss at step 60" in text
    for absent in ("econstruct", "Pictures", "Spectra", "spectral", "not there yet", "No held-out", "voxel part"):
        assert absent not in text.partition("config.toml, the effective settings")[0]
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", jepa[1])
    assert titles[6:11] == [
        "loss with the regularizer", "prediction", "variance part", "covariance part", "held-out loss alone",
    ]  # fmt: skip
    assert "held-out" in svg_under(jepa[1], "prediction")
    assert "held-out" not in svg_under(jepa[1], "loss with the regularizer")
    assert "The loss adds 1.0 (regularizer.weight) × (1.0 × variance part + 0.04 × covariance part)" in text


def test_without_a_regularizer_the_prediction_is_the_loss(tmp_path):
    folder = write_run(tmp_path / "plain", regularizer={"kind": "none"})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.update(dict.fromkeys(("variance_loss", "covariance_loss"), None))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(folder)
    assert "<figcaption>prediction</figcaption>" in page and "loss with the regularizer" not in page
    assert "The loss adds" not in page and "regularizer none" in text_of(page)


def test_the_monitors_in_numbers_and_curves(jepa):
    text = text_of(jepa[1])
    assert "61.2 effective rank of 128 dimensions; 81.5 with random weights" in text
    for row in (
        "effective rank 61.2 81.5 How many", "standard deviation 0.750 0.500–1.250 0.750 How much",
        "gap 0.125 0.001 How much", "error against average 0.800 3.500 Error", "teacher cosine 0.875 1.000 How alike",
        "LiDAR 5.5 5.5 In how many directions",
    ):  # fmt: skip
        assert row in text
    assert "on the same 9 training volumes (1,234 foreground tokens)" in text and "at most 8 here" in text
    assert "1.5 tokens from the nearest visible one" in text
    rank = svg_under(jepa[1], "effective rank")
    assert "random weights" in rank and "warning below 40.8" in rank
    assert "warning below 0.05" in svg_under(jepa[1], "gap: own subject against another")
    assert "warning below 0.1" in svg_under(jepa[1], "standard deviation of embeddings")
    assert "average of other volumes" in svg_under(jepa[1], "error over that of the average")


def test_a_healthy_run_is_told_so(jepa):
    text = text_of(jepa[1])
    assert (
        "No sign of collapse at any of the 3 probes up to step 60: embeddings stay spread out, and their effective "
        "rank is 75 % of that with random weights (warning below 50 %)." in text
    )
    assert "Predictions follow the subject: they fit its own hidden tokens better" in text
    assert "Predictions are 20.0 % better than answering with the average" in text
    assert 'class="bad"' not in jepa[1]


def test_the_masks_in_a_line(jepa):
    assert (
        "Masks hide 50.0 % of the tokens and 43.8 % of the foreground, in 12.0 blocks per volume of 6.2 % of the grid "
        "each (means). How often the places of the grid were hidden differs 1.12 times as much as chance alone"
    ) in text_of(jepa[1])


def test_how_often_each_place_was_hidden_is_a_picture_in_three_views(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "hidden, axial view" not in page_of(folder)
    counts = np.full((4, 5, 6), 100)
    counts[3, :, :], counts[:, 0, :] = 130, 70
    np.savez(folder / "masks.npz", counts=counts, draws=200)
    page = page_of(folder)
    axial, coronal = (picture(page, f"how often each place was hidden, {plane} view") for plane in ("axial", "coronal"))
    assert axial.shape[:2] == (5, 6) and coronal.shape[:2] == (4, 6)
    assert axial[4].max() < 0.3 < axial[:4].min(), "y runs to the top"
    assert coronal[0].min() > 0.7 > coronal[1:].max(), "z runs to the top"
    assert "in the 200 volumes since the last start" in text_of(page)
    (folder / "masks.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"masks\.npz cannot be read"):
        page_of(folder)


def test_a_mae_page_has_the_monitors_too(tmp_path):
    page = page_of(write_run(tmp_path / "mae", "mae"))
    text = text_of(page)
    assert "objective mae · regularizer spectral term, λ 0.01" in text
    assert "effective rank 61.2 81.5" in text and "teacher cosine" not in text
    assert "Pictures of held-out volumes" in text and "<figcaption>voxel part</figcaption>" in page
    assert "cosine of student and teacher" not in page


RANK = {"warnings": {"rank": SENTENCE}, "collapse": ["rank"], "effective_rank": 20.0}
BOTH = {"warnings": {"rank": SENTENCE, "std": "tokens are alike"}, "collapse": ["rank", "std"], "effective_rank": 20.0}


def test_warnings_say_when_and_whether_they_hold(tmp_path):
    spikes = [{"step": step, "warnings": {"spike": f"norm of step {step}"}} for step in (20, 31)]
    probes = {0: {}, 20: BOTH, 40: RANK, 60: RANK}
    page = page_of(write_run(tmp_path / "run", probes=probes, lines=spikes))
    text = text_of(page)
    assert EVIL not in page and "&lt;script&gt;" in page
    items = [text_of(item) for item in re.findall(r"<li class=.*?</li>", page, re.S)]
    assert [item.strip() for item in items[:3]] == [
        f"Steps 20 to 60, and still at the latest probe: {SENTENCE}.",
        "Step 20, no longer at the latest probe: tokens are alike.",
        "Steps 20 to 31, 2 times: norm of step 31.",
    ]
    classes = re.findall(r'<li class="(\w+)"', page)
    assert classes[:3] == ["bad", "past", "past"] and "No sign of collapse" not in text


def test_a_warning_of_the_gap_alone_is_no_sign_of_collapse(tmp_path):
    probes = {0: {}, 40: {"warnings": {"gap": "position only"}, "collapse": ["gap"], "gap": 0.01}}
    text = text_of(page_of(write_run(tmp_path / "run", probes=probes)))
    assert "Step 40, and still at the latest probe: position only." in text
    assert "No sign of collapse at the one probe up to step 40" in text and "follow the subject" not in text


def test_what_is_not_judged_yet_and_what_is_not_known(tmp_path):
    young = text_of(page_of(write_run(tmp_path / "young", probes={0: {}, 20: {"gap": 0.01}})))
    assert "Predictions do not follow the subject yet (gap 0.010); a run is judged by that from step 40 on" in young
    probes, health = {0: {}, 20: {"gap": -1e-6}}, {"gap_after_steps": 2000}
    short = text_of(page_of(write_run(tmp_path / "short", probes=probes, health=health)))
    assert "(gap 0.000); a run of fewer than 2,000 steps is not judged by that" in short
    blank = {"effective_rank": None, "gap": None, "error_over_average": 1.25}
    text = text_of(page_of(write_run(tmp_path / "blank", probes={step: blank for step in PROBED})))
    assert "Whether predictions follow the subject is not known: that takes volumes of two subjects." in text
    assert "effective rank – – Not measured: the volumes hold too few foreground tokens for 128 dimensions." in text
    assert "embeddings stay spread out." in text and "Predictions have 1.25 times the error of answering" in text


@pytest.mark.parametrize(
    ("probes", "every", "said"),
    [
        ({}, 500, "The monitors have not looked yet; they do every 500 steps (health.probe_every_steps)"),
        ({}, 0, "The monitors are switched off: health.probe_every_steps is 0."),
        ({0: {}}, 20, "Only the random weights have been looked at yet; the next probe is at step 20."),
    ],
)
def test_a_run_that_was_not_probed(tmp_path, probes, every, said):
    text = text_of(page_of(write_run(tmp_path / "run", probes=probes, health={"probe_every_steps": every})))
    assert said in text and "No sign of collapse" not in text


def test_numbers_that_are_not_finite_are_not_shown(tmp_path):
    broken = {name: float("nan") for name in HEALTHY if not name.startswith("probe_")}
    folder = write_run(tmp_path / "run", probes={0: broken, 20: broken, 40: {}, 60: broken})
    page = page_of(folder)
    assert not re.search(r"\bnan\b", page, re.I)
    assert "gap – –" in text_of(page)


def test_warnings_of_one_step_do_not_replace_each_other(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = ({"step": 2, "warnings": {"spike": "a"}}, {"step": 2, "std_median": 0.01, "warnings": {"std": "b"}})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = report.read_metrics(file)
    assert metrics[2]["warnings"] == {"spike": "a", "std": "b"}
    assert [warning.code for warning in report_health.warned(metrics)] == ["spike", "std"]
