"""The probe of the encoder while it trains: who is in it, what it writes, and that the run does not notice."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import losses, refusal, write_tiny_store
from processes import run_ranks

from brainscale import checkpoint_files, metrics, run_folder
from brainscale.config import Config
from brainscale.distributed import World
from brainscale.features import embed
from brainscale.layers import initialise
from brainscale.mae import Mae
from brainscale.online_probe import OnlineProbe
from brainscale.pretrained import from_run
from brainscale.reader import Reader
from brainscale.settings import InputError, load
from brainscale.store import Store, open_store

ALONE = World(0, 1, 0, torch.device("cpu"), "single")
PROBED = ("probe.every_steps=4", "probe.column=sex")
SHORT = ("train.num_steps=8", "data.holdout_fraction=0.4", "model.depth=2")


def label(record: dict[str, Any]) -> None:
    """Sex by subject; age; a column with one value; one that few have; one that differs between sessions."""
    subject = int(record["subject"].removeprefix("sub-"))
    record["participant"] = {
        "sex": "fm"[subject % 2], "age": f"{40 + 1.5 * subject}", "group": "patient", "session": record["session"],
    }  # fmt: skip
    if subject == 0:
        record["participant"]["rare"] = "yes"
    if subject == 3:
        del record["participant"]["sex"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 28 subjects with two scans each."""
    return write_tiny_store(tmp_path_factory.mktemp("stores") / "labelled", scans=56, change=label)


@pytest.fixture(scope="module")
def plain(labelled: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a probe."""
    folder = tmp_path_factory.mktemp("plain")
    run_ranks("pretrain", tiny_config, f"data.store={labelled}", f"run.dir={folder / 'run'}", *SHORT, logs=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def probed(labelled: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with one."""
    folder = tmp_path_factory.mktemp("probed")
    command = ("pretrain", tiny_config, f"data.store={labelled}", f"run.dir={folder / 'run'}", *SHORT, *PROBED)
    text = run_ranks(*command, logs=folder)[0].text
    assert "probe of sex (classes f, m) every 4 steps: 16 training subjects, 11 held out" in text
    assert "step 8: probe of sex: auroc" in text
    return folder / "run"


def probe_of(store: Store, config: Path, *overrides: str) -> OnlineProbe:
    settings = load(Config, config, (*SHORT, *PROBED, *overrides))
    train, held = run_folder.split_rows(store, settings)
    reader = Reader(store, settings.model.patch_voxels_zyx, settings.data.crop_voxels_zyx)
    return OnlineProbe(reader, train, held, settings, ALONE)


def scores_of(run: Path) -> dict[int, dict[str, float]]:
    lines = metrics.read(run / "metrics.jsonl")
    found = {step: {k: v for k, v in line.items() if k.startswith("probe_")} for step, line in lines.items()}
    return {step: line for step, line in found.items() if line}


def test_the_run_does_not_notice(plain, probed):
    assert losses(probed) == losses(plain), "bit for bit"
    states = [
        checkpoint_files.read_weights(checkpoint_files.directories(run / "checkpoints")[-1]) for run in (plain, probed)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_scores_are_written_at_the_start_when_due_and_at_the_end(plain, probed):
    assert scores_of(plain) == {}
    found = scores_of(probed)
    assert list(found) == [0, 4, 8]
    for line in found.values():
        assert set(line) == {"probe_auroc", "probe_auprc", "probe_balanced_accuracy"}
        assert all(0 <= value <= 1 for value in line.values())


def test_nobody_is_on_both_sides_and_each_subject_counts_once(labelled, tiny_config):
    store = open_store(labelled)
    probe = probe_of(store, tiny_config)
    train, test = probe.subjects[probe.train], probe.subjects[probe.test]
    assert not {*train} & {*test} and len({*train}) == len(train) and len({*test}) == len(test)
    settings = load(Config, tiny_config, SHORT)
    trained, held = run_folder.split_rows(store, settings)
    assert {*probe.rows[probe.train]} <= {*trained} and {*probe.rows[probe.test]} <= {*held}
    assert "sub-03" not in {*train, *test}, "who has no value"
    labels = store.column("participant_sex")[np.searchsorted(store.rows, probe.rows)]
    assert [probe.classes[y] for y in probe.y] == labels.tolist()
    few = probe_of(store, tiny_config, "probe.volumes=4")
    assert len(few.train) == len(few.test) == 4
    assert np.bincount(few.y[few.train]).tolist() == np.bincount(few.y[few.test]).tolist() == [2, 2], (
        "classes take turns"
    )
    assert {*few.rows} < {*probe.rows}


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_it_finds_what_features_hold_and_nothing_in_noise(labelled, tiny_config, kind):
    probe = probe_of(open_store(labelled), tiny_config, f'probe.kind="{kind}"')
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((len(probe.rows), 6))
    told = noise + 4 * (probe.y[:, None] == 1)
    assert probe.scores(told)["probe_auroc"] == 1
    many = [probe.scores(rng.standard_normal(noise.shape))["probe_auroc"] for _ in range(20)]
    assert 0.35 < np.mean(many) < 0.65
    broken = noise.copy()
    broken[0, 0] = np.nan
    assert set(probe.scores(broken).values()) == {None}


def test_looking_leaves_the_model_and_all_random_numbers_as_they_were(labelled, tiny_config, tmp_path):
    probe, settings = probe_of(open_store(labelled), tiny_config), load(Config, tiny_config, SHORT)
    model = Mae(settings, probe.reader.volume_zyx)
    torch.manual_seed(1)
    initialise(model, torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    writer = metrics.Writer(tmp_path, 0)
    probe.look(model, 3, writer, False, lambda _: None)
    writer.close()
    assert scores_of(tmp_path)[3].keys() == {"probe_auroc", "probe_auprc", "probe_balanced_accuracy"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
    assert (states[1] == np.random.get_state()[1]).all()


def test_a_number_is_regressed_on(labelled, tiny_config):
    probe = probe_of(open_store(labelled), tiny_config, "probe.column=age", "probe.kind=linear")
    assert probe.kind == "regression" and "(a number)" in probe.sentence
    features = np.stack([probe.y, np.cos(probe.y)], axis=1)
    found = probe.scores(features)
    assert set(found) == {"probe_mae", "probe_r2"} and found["probe_r2"] > 0.95


def test_features_are_those_of_the_saved_encoder(labelled, probed, tiny_config):
    store = open_store(labelled)
    probe, pretrained = probe_of(store, tiny_config), from_run(probed)
    features = embed(pretrained, store, probe.rows)
    expected = scores_of(probed)[pretrained.about["step"]]
    assert probe.scores(features) == pytest.approx(expected, abs=1e-6)
    shuffled = features[np.random.default_rng(0).permutation(len(features))]
    assert probe.scores(shuffled) != pytest.approx(expected, abs=1e-6)


def test_a_column_that_is_not_there_is_refused_at_the_start(labelled, tiny_config, tmp_path):
    run = tmp_path / "run"
    command = ("pretrain", tiny_config, f"data.store={labelled}", f"run.dir={run}", *SHORT, *PROBED)
    assert 'probe.column = "height" is no column of participants' in refusal(2, *command, "probe.column=height")
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("probe.column=group",), "needs two classes with 2 training subjects and 1 held-out one each"),
        (("probe.column=rare",), "needs two classes"),
        (("data.holdout_fraction=0",), "tested on held-out subjects"),
        (("probe.column=",), "needs a column of participants to predict"),
        (("probe.kind=svm",), "probe.kind"),
        (("probe.column=age", "data.holdout_fraction=0.7"), "8 training subjects have a value, and 10 are needed"),
    ],
)
def test_what_cannot_be_probed_is_refused(labelled, tiny_config, settings, said):
    with pytest.raises(InputError, match=said):
        probe_of(open_store(labelled), tiny_config, *settings)


def test_classes_too_rare_are_left_out(tmp_path, tiny_config):
    def site(record: dict[str, Any]) -> None:
        subject = int(record["subject"].removeprefix("sub-"))
        record["participant"] = {"site": "abx"[2 if subject == 0 else subject % 2]}

    store = open_store(write_tiny_store(tmp_path / "store", scans=40, change=site))
    probe = probe_of(store, tiny_config, "probe.column=site")
    assert probe.classes == ("a", "b") and probe.kind == "binary" and "sub-00" not in probe.subjects
    with pytest.raises(InputError, match="two classes"):
        probe_of(write_one_value(tmp_path), tiny_config, "probe.column=site")


def write_one_value(folder: Path) -> Store:
    return open_store(write_tiny_store(folder / "one", change=lambda r: r.update(participant={"site": "a"})))


def test_a_resumed_run_may_probe_otherwise(labelled, tiny_config, tmp_path):
    command = ("pretrain", tiny_config, f"data.store={labelled}", f"run.dir={tmp_path / 'run'}", *SHORT)
    run_ranks(*command, "train.num_steps=4", logs=tmp_path)
    run_ranks(*command, *PROBED, "probe.kind=linear", logs=tmp_path)
    assert list(scores_of(tmp_path / "run")) == [8]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_find_the_same(labelled, probed, tiny_config, tmp_path, stage):
    run = tmp_path / "run"
    command = ("pretrain", tiny_config, f"data.store={labelled}", f"run.dir={run}", *SHORT, f"zero.stage={stage}")
    run_ranks(*command, ranks=2, logs=tmp_path)
    without = losses(run)
    probed_run = tmp_path / "probed"
    run_ranks(*command, f"run.dir={probed_run}", *PROBED, ranks=2, logs=tmp_path)
    assert losses(probed_run) == without, "bit for bit"
    found, alone = scores_of(probed_run), scores_of(probed)
    assert list(found) == [0, 4, 8] and found[0] == pytest.approx(alone[0], abs=1e-6)
