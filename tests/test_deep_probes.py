"""Networks trained for a task: that they find what is there, and see nothing that they should not."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import r2_score, roc_auc_score

from brainscale import deep_probes, fit
from brainscale.config import ModelSettings
from brainscale.deep_probes import AttentiveProbe, FineTune, SmallCnn
from brainscale.prep_plan import Plan
from brainscale.pretrained import Contract, Pretrained, random_like
from brainscale.probes import FeatureProbe
from brainscale.settings import InputError

SIZE_ZYX = (16, 16, 16)
QUICK = {"lrs": (5e-3,), "weight_decays": (0.01,), "epochs": 4, "patience": 4, "batch_scans": 16}


def quick(settings, **changes):
    return settings.model_copy(update=QUICK | changes)


FEW_BLOCKS = (8, 16)
SPOT = quick(deep_probes.SMALL_CNN, lrs=(1e-2,), epochs=12, patience=12, batch_scans=8)
FOUND = quick(deep_probes.ATTENTIVE, lrs=(3e-2,), epochs=20, patience=20)


def encoder(seed=0):
    """A small encoder with random weights."""
    plan = Plan(grid_voxels_xyz=SIZE_ZYX[::-1])
    settings = ModelSettings(width=24, depth=2, heads=2, patch_voxels_zyx=(8, 8, 8))
    empty = Pretrained(settings, Contract(plan=plan, plan_hash=plan.hash(), volume_zyx=SIZE_ZYX), {})
    return random_like(empty, seed)


def task(seed, scans, classes=2):
    """(labels, subjects of two scans each), subjects in random order."""
    rng = np.random.default_rng(seed)
    subjects = np.repeat([f"s{i:03d}" for i in rng.permutation(scans // 2)], 2)
    return np.repeat(rng.permutation(np.arange(scans // 2) % classes), 2), subjects


def volumes_of(y, seed, amplitude=0.0, everywhere=0.0):
    """Noise, with a bright cube of 4³ voxels at a random place where y is 1, all voxels shifted by ± everywhere."""
    rng = np.random.default_rng(seed)
    volumes = rng.normal(0, 1, (len(y), *SIZE_ZYX)).astype(np.float32)
    for volume, label in zip(volumes, y):
        z, y0, x = rng.integers(0, 12, 3)
        volume[z : z + 4, y0 : y0 + 4, x : x + 4] += amplitude * label
        volume += everywhere * (2 * label - 1)
    return torch.from_numpy(volumes)


def one_token(seed, y, separation, tokens=30, width=24):
    """Tokens (n,N,C) that differ between places; only the third's tells the class, by `separation` deviations."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 3, (tokens, width)) + rng.normal(0, 1, (len(y), tokens, width))
    direction = rng.normal(0, 1, width)
    values[:, 2] += (y * separation / np.linalg.norm(direction))[:, None] * direction
    return values.astype(np.float16)


# ------------------------------------------------------------------------------- they find what is there


def test_an_attentive_probe_finds_what_one_token_says_and_the_mean_hides():
    y, subjects = task(0, 260)
    tokens = one_token(1, y, 5.0)
    train, test = np.arange(120), np.arange(120, 260)
    settings = quick(deep_probes.ATTENTIVE, lrs=(1e-2, 3e-2), epochs=40, patience=15)
    attentive = AttentiveProbe(tokens, subjects, "binary", 4, settings)
    found = roc_auc_score(y[test], attentive(y, train, test, 0)[:, 1])
    linear = FeatureProbe(tokens.mean(1, dtype=np.float32), subjects, "binary")
    hidden = roc_auc_score(y[test], linear(y, train, test, 0)[:, 1])
    assert found > 0.9 > 0.8 > hidden
    assert attentive.chosen.startswith("lr=")


def test_a_small_cnn_finds_a_bright_spot_wherever_it_is():
    y, subjects = task(2, 160)
    volumes = volumes_of(y, 3, amplitude=4)
    cnn = SmallCnn(lambda scans: volumes[scans], subjects, "binary", SPOT, channels=FEW_BLOCKS)
    train, test = np.arange(100), np.arange(100, 160)
    assert roc_auc_score(y[test], cnn(y, train, test, 0)[:, 1]) > 0.9


def test_fine_tuning_learns_what_frozen_features_do_not_hold():
    y, subjects = task(4, 120)
    volumes = volumes_of(y, 5, everywhere=0.05)
    blind = encoder()
    with torch.no_grad():
        blind.encoder.embed.weight -= blind.encoder.embed.weight.mean(1, keepdim=True)  # sees no mean intensity
        frozen = blind(volumes).numpy()
    train, test = np.arange(80), np.arange(80, 120)
    tuned = FineTune(blind, lambda scans: volumes[scans], subjects, "binary", quick(deep_probes.FINE_TUNE, epochs=10))
    before = roc_auc_score(y[test], FeatureProbe(frozen, subjects, "binary")(y, train, test, 0)[:, 1])
    after = roc_auc_score(y[test], tuned(y, train, test, 0)[:, 1])
    assert after > 0.95 > 0.75 > before


@pytest.mark.parametrize("name", ["attentive", "cnn"])
def test_values_are_predicted_in_their_own_unit(name):
    rng = np.random.default_rng(6)
    y, subjects = 4000 + 300 * rng.normal(size=160), np.arange(160)
    if name == "attentive":
        pipeline = AttentiveProbe(one_token(7, (y - 4000) / 300, 3.0, tokens=6), subjects, "regression", 2, FOUND)
    else:
        volumes = volumes_of((y - 4000) / 300, 7, amplitude=3)
        pipeline = SmallCnn(lambda scans: volumes[scans], subjects, "regression", SPOT, channels=FEW_BLOCKS)
    train, test = np.arange(110), np.arange(110, 160)
    predicted = pipeline(y, train, test, 0)
    assert predicted.shape == (50,)
    assert r2_score(y[test], predicted) > 0.5


def test_several_classes_have_one_probability_each():
    y, subjects = task(8, 120, classes=3)
    tokens = one_token(9, y.astype(float), 6.0, tokens=6)
    predicted = AttentiveProbe(tokens, subjects, "multiclass", 2, FOUND)(y, np.arange(80), np.arange(80, 120), 0)
    assert predicted.shape == (40, 3)
    assert predicted.sum(1) == pytest.approx(1)
    assert (predicted.argmax(1) == y[80:]).mean() > 0.7


# ------------------------------------------------------------------------- they see nothing they should not


@pytest.fixture(scope="module")
def pipelines():
    """Name → (pipeline, labels, its inputs, which may be changed); 24 scans of 12 subjects."""
    y, subjects = task(10, 24)
    tokens, volumes, pretrained = one_token(11, y, 4.0, tokens=6), volumes_of(y, 12, 1.0), encoder()

    def read(scans):
        return volumes[scans]

    return y, {
        "attentive": (AttentiveProbe(tokens, subjects, "binary", 2, quick(deep_probes.ATTENTIVE)), tokens),
        "finetune": (FineTune(pretrained, read, subjects, "binary", quick(deep_probes.FINE_TUNE)), volumes),
        "cnn": (SmallCnn(read, subjects, "binary", quick(deep_probes.SMALL_CNN), channels=FEW_BLOCKS), volumes),
    }


TRAIN, TEST = np.arange(16), np.arange(16, 24)
NAMES = pytest.mark.parametrize("name", ["attentive", "finetune", "cnn"])


@NAMES
def test_labels_of_test_scans_change_nothing(pipelines, name):
    y, (pipeline, _) = pipelines[0], pipelines[1][name]
    other = y.copy()
    other[TEST] = 1 - other[TEST]
    assert (pipeline(y, TRAIN, TEST, 3) == pipeline(other, TRAIN, TEST, 3)).all()
    moved = y.copy()
    moved[TRAIN[:2]] = 1 - moved[TRAIN[:2]]
    assert (pipeline(y, TRAIN, TEST, 3) != pipeline(moved, TRAIN, TEST, 3)).any()


@NAMES
def test_a_test_scan_changes_the_prediction_of_no_other(pipelines, name):
    y, (pipeline, inputs) = pipelines[0], pipelines[1][name]
    before, kept = pipeline(y, TRAIN, TEST, 3), inputs[TEST[0]] + 0
    inputs[TEST[0]] += 100
    after = pipeline(y, TRAIN, TEST, 3)
    inputs[TEST[0]] = kept
    assert (before[1:] == after[1:]).all()
    assert (before[0] != after[0]).any()


@NAMES
def test_the_same_seed_gives_the_same_prediction_and_leaves_torch_alone(pipelines, name):
    y, (pipeline, _) = pipelines[0], pipelines[1][name]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = pipeline(y, TRAIN, TEST, 5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert (first == pipeline(y, TRAIN, TEST, 5)).all()
    assert (first != pipeline(y, TRAIN, TEST, 6)).any()


def test_the_pretrained_weights_stay_as_they_are(pipelines):
    y, (pipeline, _) = pipelines[0], pipelines[1]["finetune"]
    pretrained = pipeline.pretrained.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in pretrained.state_dict().items()}
    pipeline(y, TRAIN, TEST, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in pretrained.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in pretrained.parameters())
    assert not pretrained.training


def test_what_is_known_of_the_tokens_is_known_of_training_scans(pipelines):
    probe = pipelines[1]["attentive"][0]
    scans, weight = np.array([1, 4, 5]), np.array([2.0, 0.5, 0.5])
    model = probe.build(scans, weight, 2, torch.Generator().manual_seed(0))
    values = probe.tokens[scans].astype(np.float64)
    mean = np.average(values, axis=0, weights=weight)
    std = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weight).mean(0))
    assert model.mean_NC.numpy() == pytest.approx(mean, abs=1e-5)
    assert model.std_C.numpy() == pytest.approx(std, rel=1e-4)


# ---------------------------------------------------------------------------------------- the fitting loop


def test_a_subject_weighs_the_same_however_many_scans_it_has():
    y = np.array([0, 0, 0, 0, 1, 1, 1])
    subjects = np.array(["a", "a", "a", "b", "c", "d", "d"])
    weight = fit.scan_weights(y, subjects, "binary")
    assert weight.mean() == pytest.approx(1)
    assert weight[:3].sum() == pytest.approx(weight[3])
    assert weight[y == 0].sum() == pytest.approx(weight[y == 1].sum())
    values = fit.scan_weights(np.arange(7.0), subjects, "regression")
    assert values == pytest.approx(np.array([1 / 3, 1 / 3, 1 / 3, 1, 1, 1 / 2, 1 / 2]) * 7 / 4)


def test_a_repeated_scan_of_a_subject_changes_nothing():
    y, subjects = np.arange(30) % 2, np.arange(30).astype(str)
    tokens = one_token(13, y, 2.0, tokens=6)
    repeated = np.concatenate([np.arange(30), np.full(20, 3)])  # 20 more files of subject 3
    settings = quick(deep_probes.ATTENTIVE, batch_scans=100, epochs=6)
    once = AttentiveProbe(tokens, subjects, "binary", 2, settings)(y, np.arange(20), np.arange(20, 30), 0)
    often = AttentiveProbe(tokens[repeated], subjects[repeated], "binary", 2, settings)
    assert often(y[repeated], np.r_[:20, 30:50], np.arange(20, 30), 0) == pytest.approx(once, abs=1e-3)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(2, 6), st.integers(0, 2**63 - 1))
def test_held_back_are_whole_subjects_of_every_class(sizes, folds, seed):
    label = np.repeat(np.arange(len(sizes) + 1), [5, *sizes])
    scans = np.random.default_rng(seed).integers(1, 4, len(label))
    y, subjects = np.repeat(label, scans), np.repeat(np.arange(len(label)), scans)
    out = fit.inner_split(y, subjects, "multiclass", folds, seed)
    assert not set(subjects[out]) & set(subjects[~out])
    assert set(y[out]) == set(y[~out]) == set(label)


def test_the_setting_is_chosen_that_predicts_held_back_subjects_best():
    y, subjects = task(14, 80)
    tokens = one_token(15, y, 8.0, tokens=4)
    settings = quick(deep_probes.ATTENTIVE, lrs=(1e-9, 1e-2), epochs=8)
    seen = []
    probe = AttentiveProbe(tokens, subjects, "binary", 2, settings, lambda done, total: seen.append((done, total)))
    probe(y, np.arange(60), np.arange(60, 80), 0)
    assert probe.chosen == "lr=0.01, weight_decay=0.01, epochs=8"
    assert seen == [(n, 16) for n in range(1, 17)]


def test_training_stops_where_the_held_back_loss_rises():
    rng = np.random.default_rng(16)
    tokens = rng.normal(0, 1, (60, 2, 200)).astype(np.float32)  # nothing to learn, much to remember
    settings = quick(deep_probes.ATTENTIVE, lrs=(3e-2,), epochs=40, patience=3)
    seen = []
    probe = AttentiveProbe(tokens, np.arange(60), "binary", 2, settings, lambda done, _: seen.append(done))
    probe(np.arange(60) % 2, np.arange(50), np.arange(50, 60), 0)
    epochs = int(probe.chosen.rsplit("=", 1)[1])
    assert epochs < 10
    assert seen == [*range(1, epochs + 4), *range(41, 41 + epochs)]


def test_layers_learn_slower_the_earlier_they_are_and_all_learn(pipelines):
    pipeline = pipelines[1]["finetune"][0]
    model = pipeline.build(np.arange(8), np.ones(8), 2, torch.Generator().manual_seed(0))
    groups = pipeline.groups(model, 1.0, 0.05)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sorted(rate) == sorted(id(p) for p in model.parameters())
    trunk = model.encoder.encoder.trunk
    order = [model.head, trunk.norm, trunk.blocks[1], trunk.blocks[0], model.encoder.encoder.embed]
    assert [rate[id(next(layer.parameters()))] for layer in order] == [1, 1, 0.75, 0.75**2, 0.75**3]
    assert all(p.ndim < 2 for group in groups if group["weight_decay"] == 0 for p in group["params"])
    assert all(p.ndim >= 2 for group in groups if group["weight_decay"] > 0 for p in group["params"])


def test_a_memory_map_serves_as_well(tmp_path, pipelines):
    y, (pipeline, tokens) = pipelines[0], pipelines[1]["attentive"]
    np.save(tmp_path / "tokens.npy", tokens)
    mapped = AttentiveProbe(
        np.load(tmp_path / "tokens.npy", mmap_mode="r"), pipeline.subjects, "binary", 2, pipeline.settings
    )
    assert (mapped(y, TRAIN, TEST, 0) == pipeline(y, TRAIN, TEST, 0)).all()


def test_half_precision_stays_near(pipelines):
    y, (pipeline, _) = pipelines[0], pipelines[1]["cnn"]
    settings = pipeline.settings.model_copy(update={"precision": "bf16"})
    half = SmallCnn(pipeline.read, pipeline.subjects, "binary", settings, channels=FEW_BLOCKS)
    assert half(y, TRAIN, TEST, 0) == pytest.approx(pipeline(y, TRAIN, TEST, 0), abs=0.1)


# ------------------------------------------------------------------------------------------------ refusals


@NAMES
def test_one_class_is_refused(pipelines, name):
    y, (pipeline, _) = pipelines[0], pipelines[1][name]
    only = TRAIN[y[TRAIN] == 0]
    with pytest.raises(InputError, match="got 0 training subjects of class 1, and a network needs 2"):
        pipeline(y, only, TEST, 0)
    lonely = np.concatenate([only, TRAIN[y[TRAIN] == 1][:1]])
    with pytest.raises(InputError, match="got 1 training subjects of class 1"):
        pipeline(y, lonely, TEST, 0)


def test_values_that_are_not_finite_are_refused(pipelines):
    y, (pipeline, tokens) = pipelines[0], pipelines[1]["attentive"]
    broken = tokens.copy()
    broken[TRAIN] = np.nan
    with pytest.raises(InputError, match="finite loss"):
        AttentiveProbe(broken, pipeline.subjects, "binary", 2, pipeline.settings)(y, TRAIN, TEST, 0)
    broken = tokens.copy()
    broken[TEST[0]] = np.nan
    with pytest.raises(InputError, match="not finite"):
        AttentiveProbe(broken, pipeline.subjects, "binary", 2, pipeline.settings)(y, TRAIN, TEST, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(pipelines):
    y, (pipeline, _) = pipelines[0], pipelines[1]["attentive"]
    there = pipeline.settings.model_copy(update={"device": "cuda"})
    with pytest.raises(InputError, match="torch sees no GPU"):
        AttentiveProbe(pipeline.tokens, pipeline.subjects, "binary", 2, there)(y, TRAIN, TEST, 0)
