"""The monitors tell a run that learns from one that collapses, and from one that answers by position alone."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, run_brainscale, write_tiny_store
from processes import finish, run_ranks, start_function

from brainscale import cli, health, metrics, session
from brainscale.config import Config
from brainscale.jepa import Jepa
from brainscale.layers import initialise
from brainscale.reader import Reader
from brainscale.settings import load
from brainscale.store import open_store

# ------------------------------------------------------------------------------------------------- measures


def test_effective_rank_of_known_spectra():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((64, 64)))
    left, _ = np.linalg.qr(rng.standard_normal((400, 64)))
    left -= left.mean(0)
    for rank in (1, 5, 64):
        tokens = torch.from_numpy(left[:, :rank] @ basis[:rank] + 7.0)
        values = np.linalg.svd(tokens.numpy() - tokens.numpy().mean(0), compute_uv=False)[:rank]
        shares = values / values.sum()
        assert health.effective_rank(tokens) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
        assert health.effective_rank(tokens) == pytest.approx(rank, rel=0.02)
        assert health.effective_rank(100 * tokens - 3) == pytest.approx(health.effective_rank(tokens), rel=1e-4)
    assert health.effective_rank(torch.ones(10, 4)) == 1.0


def test_lidar_counts_what_tells_volumes_apart():
    draw = torch.Generator().manual_seed(0)
    between = torch.randn(40, 1, 3, generator=draw) @ torch.eye(3, 16)
    noise = 0.01 * torch.randn(40, 4, 16, generator=draw)
    assert 2.5 < health.lidar(between + noise) < 3.1
    assert health.lidar(noise) > 10, "no direction stands out"


def test_the_gap_is_that_of_predictions_that_know_their_subject():
    draw = torch.Generator().manual_seed(0)
    place, subject = torch.randn(1, 50, 32, generator=draw), torch.randn(8, 50, 32, generator=draw)
    target, inside = 5 * place + subject, torch.ones(8, 50, dtype=torch.bool)
    partner = torch.arange(8).roll(-1)
    own = health.cross_sample_gap(target, target, inside, partner)
    assert own == pytest.approx(1 + 1 / 7, abs=0.03), "other volumes are at −1/7 of what is left of the mean"
    assert health.cross_sample_gap((5 * place).expand_as(target), target, inside, partner) == pytest.approx(0, abs=0.02)
    wrong_place = health.cross_sample_gap(target.roll(1, 1), target, inside, partner)
    assert abs(wrong_place) < 0.1
    same = (5 * place).expand(8, -1, -1)
    assert health.cross_sample_gap(target, same, inside, partner) == 0, "targets that depend on position only"
    half = inside.clone()
    half[:, :25] = False
    spoiled = torch.cat((target[:, :25].roll(1, 0), target[:, 25:]), dim=1)
    assert health.cross_sample_gap(spoiled, target, half, partner) == pytest.approx(own, abs=0.03)


def test_error_over_average_of_the_average_is_one():
    target = torch.randn(6, 20, 8, generator=torch.Generator().manual_seed(0))
    inside = torch.ones(6, 20, dtype=torch.bool)
    others = torch.stack([target[[k for k in range(6) if k != v]].mean(0) for v in range(6)])
    assert health.error_over_average(others, target, inside) == pytest.approx(1, rel=1e-5)
    assert health.error_over_average(target, target, inside) == 0


def test_partners_are_of_another_subject_and_the_same_contrast():
    subjects, contrasts = np.array(["a", "a", "b", "c", "b"]), np.array(["T1w", "T2w", "T1w", "T2w", "T2w"])
    assert health.partners(subjects, contrasts).tolist() == [2, 3, 0, 4, 1]
    assert health.partners(np.array(["a", "a"]), np.array(["T1w", "T1w"])) is None


# ------------------------------------------------------------------------------------------------- verdicts

GOOD = {"std_median": 0.9, "effective_rank": 60.0, "gap": 0.2}


def monitor(**settings):
    config = load(Config, None, ("objective=jepa", *(f"health.{key}={value}" for key, value in settings.items())))
    watching = health.Monitor(config)
    assert watching.probe(0, {"std_median": 0.7, "effective_rank": 80.0, "gap": 0.0}) == ({}, set())
    return watching


def test_each_sign_has_its_sentence_and_a_remedy():
    for code, change, words in (
        ("std", {"std_median": 0.05}, "hardly differ from token to token"),
        ("rank", {"effective_rank": 39.0}, "fill 39.0 dimensions, of 80.0"),
        ("gap", {"gap": 0.04}, "depend on position only"),
    ):
        signs, again = monitor().probe(5000, {**GOOD, **change})
        assert list(signs) == [code] and words in signs[code] and not again
        assert "lower optim.lr" in signs[code] or "try" in signs[code]
    assert monitor().probe(5000, GOOD) == ({}, set())


def test_the_gap_is_not_judged_before_its_time_and_an_unknown_rank_never():
    assert monitor(gap_after_steps=6000).probe(5000, {**GOOD, "gap": -0.1}) == ({}, set())
    assert monitor().probe(5000, {"std_median": 0.9, "effective_rank": None, "gap": None}) == ({}, set())


def test_the_rank_of_a_mae_is_not_judged():
    """Reconstruction concentrates features on few dimensions while it learns."""
    mae = health.Monitor(load(Config, None, ()))
    mae.probe(0, {**GOOD, "effective_rank": 80.0})
    assert mae.probe(5000, {**GOOD, "effective_rank": 9.0}) == ({}, set())
    bad = {"std_median": 0.0, "effective_rank": 9.0, "gap": 0.0}
    assert set(monitor().probe(5000, bad)[0]) == {"std", "rank", "gap"}


def test_two_lines_of_a_step_keep_both_warnings(tmp_path):
    lines = ({"step": 4, "loss": 1.0, "warnings": {"spike": "a"}}, {"step": 4, "gap": 0.1, "warnings": {"gap": "b"}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert metrics.read(tmp_path / "metrics.jsonl")[4]["warnings"] == {"spike": "a", "gap": "b"}


def test_a_sign_counts_as_standing_at_the_second_probe_and_after_a_resume():
    watching, bad = monitor(), {**GOOD, "effective_rank": 20.0}
    assert watching.probe(5000, bad)[1] == set()
    assert watching.probe(5500, bad)[1] == {"rank"}
    assert watching.probe(6000, GOOD)[1] == set() and watching.probe(6500, bad)[1] == set()
    resumed = health.Monitor(watching.config)
    lines = {
        0: {"step": 0, "std_median": 0.7, "effective_rank": 80.0},
        6500: {"step": 6500, **bad, "collapse": ["rank"]},
    }
    resumed.resume(lines)
    assert resumed.probe(7000, bad)[1] == {"rank"}


def test_a_spike_is_a_norm_far_above_its_median():
    watching = monitor(max_spike=10.0)
    assert all(watching.spike(value) is None for value in (50.0, *[1.0] * 20, 9.0, None))
    assert "11 times its median" in watching.spike(11.0)
    assert health.Monitor(watching.config).spike(1e9) is None, "nothing to compare with yet"
    resumed = health.Monitor(watching.config)
    resumed.resume({step: {"step": step, "grad_norm": 1.0} for step in range(1, 20)})
    assert "11 times its median" in resumed.spike(11.0)


@pytest.mark.slow
def test_spikes_of_a_run_are_said_and_kept(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    started = run_ranks("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "train.num_steps=24",
                        "health.max_spike=1.0001", "optim.lr=1e-9", logs=tmp_path)  # fmt: skip
    spiked = {step: line["warnings"]["spike"] for step, line in metrics.read(run / "metrics.jsonl").items()
              if "warnings" in line}  # fmt: skip
    assert spiked and min(spiked) > 10
    assert all(f"WARNING, step {step}: {sentence}" in started[0].text for step, sentence in spiked.items())


# ------------------------------------------------------------------------------------------------- whole runs

TINY_RUN = (
    ROOT / "configs" / "jepa_vcr_tiny_cpu.toml", "model.patch_voxels_zyx=[8,8,8]", "model.width=48", "model.depth=2",
    "model.heads=2", "jepa.predictor_width=48", "jepa.predictor_depth=1", "jepa.momentum=0.98", "optim.lr=2e-3",
    "train.num_steps=200", "log.every_steps=20", "log.holdout_every_steps=1000", "checkpoint.every_steps=1000",
    "health.gap_after_steps=150", "health.probe_every_steps=50",
)  # fmt: skip


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A store of 24 synthetic brains at 4 mm."""
    root = tmp_path_factory.mktemp("phantoms")
    run_brainscale("phantom", root / "bids", "--subjects", "24", "--spacing-mm", "4")
    coarse = ("grid_voxels_xyz=[40,48,40]", "spacing_mm_xyz=[4.0,4.0,4.0]")
    run_brainscale("to-zarr", root / "bids", root / "store", "--prep", ROOT / "configs/prep/brain_2mm.toml", *coarse)
    return root / "store"


def pretrain(store, run, *overrides, code=0):
    """What the run said, and its probes by step."""
    arguments = ("pretrain", *TINY_RUN, f"data.store={store}", f"run.dir={run}", *overrides)
    command = with_a_teacher_of_positions if "jepa.momentum=1.0" in overrides else cli.main
    function = partial(command, [*map(str, arguments)])
    started = finish(start_function(function, ranks=1, logs=run.with_suffix(".logs")), code, timeout_s=500)
    lines = metrics.read(run / "metrics.jsonl")
    return started[0].text, {step: line for step, line in lines.items() if "std_median" in line}


def with_a_teacher_of_positions(arguments):
    """Run a command with a teacher that does not see voxels, so that its tokens depend on their places alone."""
    build = session.build

    def blind(*given):
        run = build(*given)
        for parameter in run.model.teacher.embed.parameters():
            run.model.average.fill(parameter, torch.zeros_like(parameter))
        run.model.average.publish()
        return run

    session.build = blind
    cli.main(arguments)


@pytest.mark.slow
def test_a_healthy_run_is_not_flagged(phantoms, tmp_path):
    said, probes = pretrain(phantoms, tmp_path / "run")
    assert list(probes) == [0, 50, 100, 150, 200] and "WARNING" not in said
    assert not any("warnings" in line for line in probes.values())
    assert probes[200]["gap"] > max(0.05, probes[50]["gap"]) and probes[0]["teacher_cosine"] == pytest.approx(1)
    assert probes[200]["effective_rank"] > 0.5 * probes[0]["effective_rank"]
    assert all(line["probe_tokens"] >= 4 * 48 and line["probe_volumes"] >= 16 for line in probes.values())


@pytest.mark.slow
def test_a_run_forced_to_collapse_is_flagged_and_stopped_when_asked(phantoms, tmp_path):
    forced = ("regularizer.kind=none", "jepa.momentum=0.0", "optim.lr=1e-2")
    said, probes = pretrain(phantoms, tmp_path / "warned", *forced)
    assert max(probes) == 200 and "rank" in probes[100]["collapse"], "it goes on unless it is asked to stop"
    assert "WARNING, step 100: embeddings fill" in said and "lower optim.lr" in said
    said, probes = pretrain(phantoms, tmp_path / "stopped", *forced, "health.stop_on_collapse=true", code=5)
    assert max(probes) == 100, "at the second probe in a row"
    ended = json.loads((tmp_path / "stopped" / "exit.json").read_text())
    assert ended["code"] == 5 and "health.stop_on_collapse" in ended["sentence"] and "100, which is saved" in said


@pytest.mark.slow
def test_targets_of_position_alone_are_caught_by_the_gap_alone(phantoms, tmp_path):
    said, probes = pretrain(phantoms, tmp_path / "run", "jepa.momentum=1.0")
    assert probes[150]["collapse"] == probes[200]["collapse"] == ["gap"]
    assert probes[200]["std_median"] > 0.5 and abs(probes[200]["gap"]) < 1e-3
    assert "predictions depend on position only" in said


JEPA = (
    "objective=jepa", "jepa.predictor_width=12", "jepa.predictor_depth=1", "jepa.predictor_heads=1",
    "mask.fraction=0.5", "regularizer.kind=vcr", "jepa.momentum=0.9", "train.num_steps=8",
    "health.probe_every_steps=4", "health.probe_volumes=4",
)  # fmt: skip


@pytest.mark.slow
def test_the_numbers_are_the_same_on_any_ranks_and_stage(tiny_store, tiny_config, tmp_path):
    found = {}
    for name, ranks, stage in (("one", 1, 1), ("two", 2, 2), ("sharded", 2, 3)):
        overrides = (*JEPA, f"zero.stage={stage}", f"data.store={tiny_store}", f"run.dir={tmp_path / name}")
        run_ranks("pretrain", tiny_config, *overrides, ranks=ranks, logs=tmp_path)
        lines = metrics.read(tmp_path / name / "metrics.jsonl")
        found[name] = [lines[step] for step in (0, 4, 8)]
    for key in (
        "std_low",
        "std_median",
        "gap",
        "lidar",
        "error_over_average",
        "teacher_cosine",
        "mask_distance_tokens",
    ):
        for name in ("two", "sharded"):
            assert [line[key] for line in found[name]] == pytest.approx([line[key] for line in found["one"]], rel=1e-3)


@pytest.mark.slow
def test_a_collapse_ends_all_ranks_together_and_can_be_gone_past(tiny_store, tiny_config, tmp_path):
    """The warning is forced: no embedding has a standard deviation of 100."""
    command = ("pretrain", tiny_config, *JEPA, f"data.store={tiny_store}", f"run.dir={tmp_path / 'run'}",
               "health.min_std=100", "health.stop_on_collapse=true")  # fmt: skip
    started = run_ranks(*command, ranks=2, logs=tmp_path, code=5)
    assert "error: after step 8, which is saved, embeddings hardly differ" in started[0].text
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 5
    run_ranks(*command[:-1], "train.num_steps=10", ranks=1, logs=tmp_path)
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert lines[4]["collapse"] == lines[8]["collapse"] == lines[10]["collapse"] == ["std"]


def test_mae_runs_are_examined_too(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    run_ranks("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "train.num_steps=4",
              "health.probe_every_steps=2", "mae.normalize_target=true", logs=tmp_path)  # fmt: skip
    lines = metrics.read(run / "metrics.jsonl")
    for step in (0, 2, 4):
        assert lines[step]["teacher_cosine"] is None and lines[step]["gap"] is not None
        assert lines[step]["effective_rank"] is None, "six volumes hold too few tokens: it is left out"
        assert lines[step]["probe_volumes"] == 6 and lines[step]["std_median"] > 0


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("case", ["one volume is not finite", "no foreground", "one subject", "two volumes"])
def test_odd_training_sets_leave_numbers_out_and_the_run_goes_on(case, tiny_config, tmp_path):
    def spoil(record):
        if case == "one volume is not finite" and record["row"] == 4:
            record["std"] = 1e-45
        if case == "one subject":
            record["subject"] = "sub-00"

    store = write_tiny_store(tmp_path / "store", scans=2 if case == "two volumes" else 8, change=spoil)
    config = load(Config, tiny_config, (*JEPA, f"data.store={store}", "data.holdout_fraction=0.0"))
    reader = Reader(open_store(store), config.model.patch_voxels_zyx, None)
    if case == "no foreground":
        reader.store.foreground = lambda rows: np.zeros((len(rows), 4, 6, 4), np.uint8)
    model = Jepa(config, reader.volume_zyx)
    initialise(model, torch.Generator().manual_seed(0))
    probe = health.Probe(reader, reader.store.rows, config)
    one_per_step = health.Probe(reader, reader.store.rows, load(Config, tiny_config, (*JEPA, "mask.shared=true")))
    assert len({tuple(one_per_step.masks(number, 1).masked[0].tolist()) for number in range(4)}) > 1
    assert len({tuple(probe.masks(number, 1).masked[0].tolist()) for number in range(4)}) == 4, "four masks"
    found = probe.examine(model, torch.device("cpu"))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    missing = {key for key, value in found.items() if value is None}
    assert found["mask_distance_tokens"] >= 1
    if case in ("one volume is not finite", "no foreground"):
        assert missing >= {"std_median", "gap", "error_over_average", "teacher_cosine"}
    else:
        assert missing - {"effective_rank"} == {"gap"}
    assert health.Monitor(config).probe(8, found)[0].keys() <= {"std"}
