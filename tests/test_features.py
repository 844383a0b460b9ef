"""Features are what the encoder makes of the values it was trained on, pooled as asked; another plan is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG, write_tiny_store
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainscale import features
from brainscale.config import Config, ModelSettings
from brainscale.features import embed, feature_names, pooled, read_normalised, token_foreground
from brainscale.geometry import patchify
from brainscale.layers import initialise
from brainscale.loader import read_batch
from brainscale.mae import Mae
from brainscale.prep_plan import Plan
from brainscale.pretrained import Contract, Pretrained
from brainscale.reader import Reader
from brainscale.sampling import Draw
from brainscale.settings import InputError, load
from brainscale.store import Store, open_store
from brainscale.stores import open_stores
from brainscale.volume_embedder import VolumeEmbedder
from brainscale_kernels.patch_gather import patch_gather_reference

PATCH = (8, 8, 8)
SETTINGS = ModelSettings(width=24, depth=3, heads=2, patch_voxels_zyx=PATCH)


def encoder_for(plan: Plan, volume_zyx: tuple[int, int, int], seed: int = 0) -> Pretrained:
    """An encoder with random weights that was trained on volumes of this plan."""
    contract = Contract(plan=plan, plan_hash=plan.hash(), volume_zyx=volume_zyx)
    about = {"objective": "mae", "part": "encoder", "step": 7, "samples": 28, "source": "a"}
    pretrained = Pretrained(SETTINGS, contract, about)
    initialise(pretrained.encoder, torch.Generator().manual_seed(seed))
    return pretrained


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> Store:
    return open_store(tiny_store)


@pytest.fixture(scope="module")
def pretrained(store: Store) -> Pretrained:
    return encoder_for(store.plan, store.volume_zyx)


# ------------------------------------------------------------------------------------------------ values


def stretch(record: dict[str, Any]) -> None:
    """Codes that mean something else in every row, and clip bounds that cut."""
    record |= {"scale": 0.37 + record["row"], "offset": -100.0 / 3 * record["row"], "background_code": 0}
    for name in ("mean", "clip_low", "clip_high"):
        record[name] = record[name] * record["scale"] + record["offset"]
    record["std"] *= record["scale"]
    record["clip_low"] += 0.4 * record["std"]
    record["clip_high"] -= 0.4 * record["std"]


@pytest.mark.parametrize("normalize", ["zscore", "unit_range", "none"])
@pytest.mark.parametrize("dtype", ["int16", "uint8", "float32"])
def test_values_are_those_of_training_bit_for_bit(tmp_path, normalize, dtype):
    plan = Plan(grid_voxels_xyz=(16, 24, 16), shard_volumes=4, normalize=normalize, dtype=dtype)
    store = open_store(write_tiny_store(tmp_path / "store", scans=5, plan=plan, change=stretch))
    rows = [3, 0, 4]
    values = read_normalised(store, rows)
    assert values.dtype == torch.float32 and values.shape == (3, *store.volume_zyx)
    reader = Reader(store, PATCH, None)
    batch = read_batch(reader, [Draw(0, row, (0, 0, 0), False) for row in rows])
    ids = torch.arange(batch.foreground.shape[1]).expand(3, -1)
    assert torch.equal(patchify(values[:, None], PATCH), patch_gather_reference(batch.stored, ids, PATCH))
    low, high = (torch.from_numpy(column[rows]) for column in reader.affine[2:])
    assert torch.equal(values.amin((1, 2, 3)), low) and torch.equal(values.amax((1, 2, 3)), high), "both bounds cut"


def test_features_are_those_of_the_model_in_training(store, pretrained, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY_CONFIG)
    config = load(Config, tmp_path / "tiny.toml", ("model.depth=3",))
    model = Mae(config, store.volume_zyx).eval()
    model.encoder.load_state_dict(pretrained.encoder.state_dict())
    batch = read_batch(Reader(store, PATCH, None), [Draw(0, row, (0, 0, 0), False) for row in (1, 8)])
    ids = torch.arange(batch.foreground.shape[1]).expand(2, -1)
    with torch.no_grad():
        expected = model.embed(batch, ids).mean(1).numpy()
    np.testing.assert_allclose(embed(pretrained, store, [1, 8]), expected, atol=1e-6)


def test_foreground_of_tokens_is_that_of_the_loader(store):
    batch = read_batch(Reader(store, PATCH, None), [Draw(0, row, (0, 0, 0), False) for row in (5, 2)])
    assert torch.equal(token_foreground(store, [5, 2], PATCH), batch.foreground)
    assert 0 < batch.foreground.mean() < 1
    with pytest.raises(InputError, match="no multiple of the foreground cell"):
        token_foreground(store, [0], (8, 6, 8))


# ------------------------------------------------------------------------------------------------ pooling


@pytest.mark.parametrize("within", [False, True])
def test_pooling_is_what_its_name_says(within):
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 3, 10, 4, generator=draw)
    inside = torch.rand(3, 10, generator=draw) > 0.5 if within else torch.ones(3, 10, dtype=torch.bool)
    given = inside if within else None
    found = {name: pooled(tokens, name, given).numpy() for name in features.POOLINGS}
    for b in range(3):
        kept = tokens[:, b, inside[b]].numpy()
        mean, std = kept.mean(1), kept.std(1)
        np.testing.assert_allclose(found["mean"][b], mean.reshape(-1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["max"][b], kept.max(1).reshape(-1))
        np.testing.assert_allclose(found["mean+std"][b], np.stack([mean, std], 1).reshape(-1), rtol=1e-5, atol=1e-6)


def test_layers_and_names_agree(store, pretrained):
    with torch.no_grad():
        tokens = pretrained.tokens(read_normalised(store, [0, 6]), (0, -1, 2))
    found = embed(pretrained, store, [0, 6], (0, -1, 2), "mean+std")
    names = feature_names(24, (0, -1, 2), "mean+std")
    assert found.shape == (2, len(names)) == (2, 144) and len({*names}) == 144
    for name, column in zip(names, found.T):
        layer, part, at = name.removeprefix("layer").split("_")
        one = tokens[[0, -1, 2].index(int(layer)), :, :, int(at)]
        expected = one.mean(1) if part == "mean" else one.std(1, correction=0)
        np.testing.assert_allclose(column, expected.numpy(), atol=2e-6)


def test_foreground_only_looks_at_nothing_else(store, pretrained, monkeypatch):
    shares = token_foreground(store, [4], PATCH)[0]
    inside = shares >= shares.mean()
    monkeypatch.setattr(features, "MIN_FOREGROUND", float(shares.mean()))
    with torch.no_grad():
        tokens = pretrained.tokens(read_normalised(store, [4]))[0, 0]
    assert 0 < inside.sum() < len(inside)
    found = embed(pretrained, store, [4], pooling="max", foreground_only=True)[0]
    np.testing.assert_allclose(found, tokens[inside].max(0).values.numpy(), atol=1e-6)
    assert np.abs(found - embed(pretrained, store, [4], pooling="max")[0]).max() > 1e-3


def test_a_volume_without_foreground_is_refused(store, pretrained, monkeypatch):
    monkeypatch.setattr(features, "MIN_FOREGROUND", 2.0)
    with pytest.raises(InputError, match="row 3 has no token of foreground"):
        embed(pretrained, store, [3], foreground_only=True)


# ------------------------------------------------------------------------------------------------ embedding


def test_batches_and_order_do_not_matter(store, pretrained):
    rows = [7, 0, 3, 7, 9]
    done: list[int] = []
    whole = embed(pretrained, store, rows)
    np.testing.assert_allclose(embed(pretrained, store, rows, batch=2, progress=done.append), whole, atol=1e-6)
    assert done == [2, 2, 1]
    np.testing.assert_array_equal(whole[0], whole[3])
    assert np.abs(whole[0] - whole[1]).max() > 1e-3, "scans differ"
    assert embed(pretrained, store, []).shape == (0, 24)
    assert embed(pretrained, store, store.rows).dtype == np.float32


def test_the_batch_fits_the_memory_and_follows_from_sizes_alone(pretrained):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    sizes = [features.batch_volumes(pretrained, zyx, 1, cpu) for zyx in ((16, 24, 16), (80, 96, 80), (400, 400, 400))]
    assert sizes[0] == features.MAX_BATCH >= sizes[1] > sizes[2] == 1
    assert features.batch_volumes(pretrained, (160, 192, 160), 1, cuda) > sizes[1] // 8


def test_crop_trained_encoders_see_whole_volumes(store):
    cropped = encoder_for(store.plan, (16, 16, 16))
    with torch.no_grad():
        expected = cropped.at(store.volume_zyx)(read_normalised(store, [2]))
    np.testing.assert_allclose(embed(cropped, store, [2]), expected.numpy(), atol=1e-6)
    with pytest.raises(InputError, match="multiple of the patch"):
        embed(encoder_for(store.plan, (16, 16, 16)).at((16, 16, 16)), resized(store), [2])


def resized(store: Store) -> Store:
    other = Store(store.path)
    other.volume_zyx = (16, 20, 16)
    return other


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"spacing_mm_xyz": (2.0, 2.0, 2.0)}, "spacing_mm_xyz"),
        ({"orientation": "LPS"}, "orientation"),
        ({"normalize": "unit_range"}, "normalize"),
        ({"clip_percentiles": (0.0, 100.0)}, "clip_percentiles"),
    ],
)
def test_a_store_of_another_plan_is_refused(store, changes, named):
    other = encoder_for(store.plan.model_copy(update=changes), store.volume_zyx)
    with pytest.raises(InputError, match=f"(?s){store.path}.*{named}"):
        embed(other, store, [0])


def test_what_does_not_change_values_may_differ(store, pretrained):
    other = encoder_for(store.plan.model_copy(update={"codec": "zstd", "shard_volumes": 1}), store.volume_zyx)
    np.testing.assert_array_equal(embed(other, store, [0]), embed(pretrained, store, [0]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rows": [0, 99]}, "row 99 of the store was refused or does not exist"),
        ({"layers": ()}, "got layers"),
        ({"layers": (1, 1)}, "each once"),
        ({"layers": (3,)}, "got layer 3"),
        ({"pooling": "median"}, "mean, max, mean"),
    ],
)
def test_mistakes_are_one_sentence(store, pretrained, arguments, said):
    with pytest.raises(InputError, match=said):
        embed(pretrained, store, **{"rows": [0], **arguments})


def test_devices():
    assert features.choose_device("cpu").type == "cpu"
    assert features.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="auto, cpu or cuda"):
        features.choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="sees no GPU"):
            features.choose_device("cuda")


# ------------------------------------------------------------------------------------------------ tables


def test_a_table_says_whose_features_and_how(tmp_path, store, pretrained):
    def name(record: dict[str, Any]) -> None:
        record["participant"] = {"sex": "fm"[record["row"] % 2]} if record["row"] else {}

    paths = [store.path, write_tiny_store(tmp_path / "other", scans=4, change=name)]
    both = open_stores(paths)
    rows = both.rows[[11, 10, 3]]
    found = embed(pretrained, both, rows)
    made = features.table(features.store_scans(both, rows), found, pretrained, layers=[-1], pooling="mean")
    people = ["participant_age", "participant_sex"]
    assert made.column_names == ["row", "id", "subject", "session", "contrast", "warnings", *people, "features"]
    assert made["row"].to_pylist() == [11, 10, 3]
    assert made["subject"].to_pylist() == ["2/sub-00", "2/sub-00", "1/sub-01"]
    assert made["participant_sex"].to_pylist() == ["m", None, None]
    assert made["participant_age"].to_pylist() == [None, None, "60"]
    np.testing.assert_array_equal(np.stack(made["features"].to_numpy()), found)
    said = {name.decode(): text.decode() for name, text in made.schema.metadata.items()}
    assert said == {
        "encoder": "a", "objective": "mae", "part": "encoder", "step": "7", "samples": "28", "layers": "[-1]",
        "plan_hash": store.plan_hash, "trained_volume_zyx": "[16, 24, 16]", "pooling": "mean",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ scikit-learn


def test_the_transformer_works_in_a_pipeline(store, pretrained):
    embedder = VolumeEmbedder(pretrained, store.path, layers=(0, -1))
    y = np.array([0, 1] * 5)
    steps = make_pipeline(clone(embedder), StandardScaler(), LogisticRegression())
    scores = cross_val_score(steps, store.rows, y, cv=2)
    assert scores.shape == (2,) and np.isfinite(scores).all()
    found = clone(embedder).fit(store.rows).transform(store.rows[:, None])
    np.testing.assert_array_equal(found, embed(pretrained, store, store.rows, (0, -1)))
    again = embedder.fit(store.rows).transform([4, 4, 1])
    np.testing.assert_allclose(again, found[[4, 4, 1]], atol=1e-6)
    frame = embedder.set_output(transform="pandas").fit_transform(store.rows)
    assert frame.columns.tolist() == feature_names(24, (0, -1), "mean") == embedder.get_feature_names_out().tolist()
    assert frame.shape == (10, 48)


@pytest.mark.parametrize(
    ("X", "said"),
    [(["a.nii.gz"], "X must be rows"), ([[0, 1]], "shape"), ([-1], "X must be rows"), ([50], "does not exist")],
)
def test_the_transformer_refuses_what_are_no_rows(store, pretrained, X, said):
    with pytest.raises(InputError, match=said):
        VolumeEmbedder(pretrained, store.path).fit().transform(X)


def test_the_transformer_refuses_settings_when_fitted(pretrained):
    for wrong in ({"pooling": "median"}, {"layers": ()}, {"device": "tpu"}):
        with pytest.raises(InputError):
            VolumeEmbedder(pretrained, **wrong).fit()
