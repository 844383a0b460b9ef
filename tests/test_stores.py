"""Several stores in one run: rows, names and duplicates; what cannot be together; shares; a run that moves."""

import json
import pickle
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import TINY_GRID_ZYX, losses, write_tiny_store
from processes import run_ranks

from brainscale import run_folder
from brainscale.checkpoint_files import TrainState
from brainscale.cli import dry_run_text
from brainscale.config import Config
from brainscale.prep_plan import Plan
from brainscale.samplers import make_order
from brainscale.sampling import held_out
from brainscale.settings import InputError, load
from brainscale.store import Store, store_files
from brainscale.stores import Stores, open_stores, store_paths, subjects_of

GRID_XYZ = TINY_GRID_ZYX[::-1]
OTHER_LAYOUT = Plan(grid_voxels_xyz=GRID_XYZ, shard_volumes=2, codec="zstd", chunk_voxels_zyx="volume")


def contrasts(record):
    """A second data set: other voxels but for one scan, PDw in place of T1w for half of them."""
    record["voxels_xxh3_128"] = f"{record['row'] + 1000 * (record['row'] != 5):032x}"
    record["contrast"] = ("T1w", "PDw")[record["row"] % 2]


def with_refused(path, scans):
    """A store whose row 1 was refused."""

    def change(record):
        if record["row"] == 1:
            kept = {"row": 1, "id": record["id"], "source": record["source"]}
            record.clear()
            record |= {**kept, "status": "refused", "reason": "rgb", "sentence": "colours"}

    return write_tiny_store(path, scans, change=change)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Ten scans, of which one is refused, and six of a plan that differs in layout."""
    folder = tmp_path_factory.mktemp("stores")
    other = write_tiny_store(folder / "b" / "brains", 6, OTHER_LAYOUT, contrasts)
    return [with_refused(folder / "a" / "brains", 10), other]


@pytest.fixture(scope="module")
def pair(paths):
    return open_stores(paths)


def settings_of(paths, *overrides, weights=(1, 3)):
    stores = ",".join(f'{{path="{path}",weight={weight}}}' for path, weight in zip(paths, weights))
    return (f"data.stores=[{stores}]", *overrides)


def test_one_store_is_what_it_is_alone(paths):
    alone, one = Store(paths[0]), open_stores(paths[:1])
    for name in ("plan", "plan_hash", "volume_zyx", "dtype", "num_bytes", "refused"):
        assert getattr(one, name) == getattr(alone, name)
    assert one.rows.tolist() == alone.rows.tolist() == [0, *range(2, 10)]
    for name in store_files.COLUMNS:
        assert (
            np.array_equal(one.column(name), alone.column(name)) and one.column(name).dtype == alone.column(name).dtype
        )
    assert subjects_of(one).tolist() == subjects_of(alone).tolist()
    config = load(Config, None, ("data.holdout_fraction=0.4",))
    for rows, wanted in zip(run_folder.split_rows(one, config), run_folder.split_rows(alone, config)):
        assert rows.tolist() == wanted.tolist()
        order = make_order(one, rows, config)
        assert run_folder.data_hash(one, order) == run_folder.data_hash(alone, order)


def test_rows_and_names_of_two(pair, paths):
    one, two = (Store(path) for path in paths)
    assert pair.rows.tolist() == [0, *range(2, 10), *range(10, 16)]
    assert pair.number(pair.rows).tolist() == [0] * 9 + [1] * 6
    assert pair.column("row").tolist() == pair.rows.tolist()
    ids = [f"1/{scan}" for scan in one.column("id")] + [f"2/{scan}" for scan in two.column("id")]
    assert pair.column("id").tolist() == ids and len(set(ids)) == 15
    assert set(pair.column("subject")) == {f"1/sub-0{n}" for n in range(5)} | {f"2/sub-0{n}" for n in range(3)}
    assert pair.column("contrast").tolist() == ["T1w"] * 9 + ["T1w", "PDw"] * 3
    assert pair.column("affine_stored").shape == (15, 16) and pair.column("scale").dtype == np.float64
    assert pair.num_bytes == one.num_bytes + two.num_bytes and pair.plan_hash == one.plan_hash
    assert pair.refused == [{**one.refused[0], "id": f"1/{one.refused[0]['id']}"}]
    turned = open_stores(paths[::-1])
    assert turned.rows.tolist() == [*range(6), 6, *range(8, 16)]
    assert turned.refused[0]["row"] == 7 and turned.refused[0]["id"].startswith("2/")


def test_voxels_come_from_the_right_store(pair, paths):
    one, two = (Store(path) for path in paths)
    assert np.array_equal(
        pair.volumes([9, 10, 0, 15]),
        np.concatenate([one.volumes([9]), two.volumes([0]), one.volumes([0]), two.volumes([5])]),
    )
    assert np.array_equal(pair.volumes(np.array([11, 12])), two.volumes([1, 2]))
    assert np.array_equal(pair.foreground([3, 13]), np.concatenate([one.foreground([3]), two.foreground([3])]))
    assert np.array_equal(pair.crop(12, (4, 8, 0), (8, 8, 4)), two.crop(2, (4, 8, 0), (8, 8, 4)))
    assert pair.volumes([]).shape == (0, *TINY_GRID_ZYX) and pair.foreground([]).shape == (0, 4, 6, 4)
    assert pair.file_of(9) == str(paths[0] / "volumes/c/2/0/0/0") and pair.file_of(13).startswith(
        f"{paths[1]}/volumes/c/1/"
    )
    for row in (1, 16, -1, -7):
        with pytest.raises(IndexError, match="cannot be read"):
            pair.volumes([row])
        with pytest.raises(IndexError, match="cannot be read"):
            pair.crop(row, (0, 0, 0), (4, 4, 4))
    again = pickle.loads(pickle.dumps(pair))  # noqa: S301
    assert np.array_equal(again.volumes([9, 10]), pair.volumes([9, 10])) and len(pickle.dumps(pair)) < 10_000


def test_damage_names_the_file(paths, tmp_path):
    broken = shutil.copytree(paths[1], tmp_path / "broken")
    stores = open_stores([paths[0], broken])
    file = broken / "volumes" / "c" / "1" / "0" / "0" / "0"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(store_files.StoreDamage, match="broken/volumes/c/1/0/0/0"):
        stores.volumes([0, 12])
    with pytest.raises(store_files.StoreDamage, match="broken/volumes/c/1/0/0/0"):
        open_stores([paths[0], broken])


def test_equal_voxels_in_two_stores_are_one_persons(pair):
    """Row 5 of the second store repeats row 5 of the first: it says so, and the split keeps them together."""
    twins = {at: twin for at, twin in enumerate(pair.column("duplicate_of")) if twin}
    assert twins == {14: "1/sub-02_ses-1_T1w"}
    subjects = subjects_of(pair)
    at = pair.rows.tolist().index(5)
    assert subjects[14] == subjects[at] == "1/sub-02" and subjects[13] == "2/sub-02"
    sides = set()
    for seed in range(30):
        held = held_out(subjects, 0.3, seed)
        assert held[14] == held[at]
        sides.add(bool(held[at]))
    assert sides == {True, False}


def test_a_duplicate_of_a_duplicate_leads_to_the_first(tmp_path):
    """In the first store all scans are the same, under other subjects; so are those of the second."""

    def change(record):
        record |= {"voxels_xxh3_128": "f" * 32, "subject": f"sub-{record['row']}"}

    paths = [write_tiny_store(tmp_path / name, 3, change=change) for name in "ab"]
    stores = Stores(paths)
    assert stores.column("duplicate_of").tolist() == ["", *["1/sub-00_ses-0_T1w"] * 5]
    assert set(subjects_of(stores)) == {"1/sub-0"}


def test_other_scans_and_no_other_places_have_another_hash(pair, paths, tmp_path):
    moved = Stores([shutil.copytree(path, tmp_path / f"elsewhere-{number}") for number, path in enumerate(paths)])
    config = load(Config, None, ("data.holdout_fraction=0.4",))
    one, two = (run_folder.split_rows(stores, config)[0] for stores in (pair, moved))
    assert one.tolist() == two.tolist()
    here, fewer, balanced = (
        make_order(Stores([paths[0]]), rows, load(Config, None, sampler))
        for rows, sampler in ((one[:3], ()), (one[1:3], ()), (one[:3], ("data.sampler=subject_balanced",)))
    )
    assert run_folder.data_hash(pair, here) == run_folder.data_hash(moved, here)
    assert len({run_folder.data_hash(pair, order) for order in (here, fewer, balanced)}) == 3
    assert run_folder.data_hash(pair, here) != run_folder.data_hash(Stores([paths[1]]), here)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"spacing_mm_xyz": (2.0, 2.0, 2.0)}, "spacing_mm_xyz = [2.0, 2.0, 2.0] in place of [1.0, 1.0, 1.0]"),
        ({"normalize": "none", "codec": "zstd"}, "(normalize = 'none' in place of 'zscore')"),
    ],
)
def test_stores_of_different_plans_are_refused(change, part, paths, tmp_path):
    other = write_tiny_store(tmp_path / "other", 2, Plan(grid_voxels_xyz=GRID_XYZ, **change))
    with pytest.raises(InputError) as caught:
        Stores([paths[0], other])
    assert part in str(caught.value) and str(other) in str(caught.value) and "\n" not in str(caught.value)


def test_stores_of_different_grids_and_a_store_given_twice_are_refused(paths, tmp_path):
    """A plan with the largest grid of its source says nothing about the grid."""
    two = [write_tiny_store(tmp_path / name, 2, Plan(grid_voxels_xyz="largest")) for name in "ab"]
    Stores(two)
    file = two[1] / "COMPLETE.json"
    complete = json.loads(file.read_text()) | {"grid_zyx": [16, 24, 20]}
    complete.pop("digest")
    digest = store_files.xxh3_128_hexdigest(store_files.to_json(complete))
    file.write_bytes(store_files.to_json(complete | {"digest": digest}))
    with pytest.raises(InputError, match=r"volumes of \(16, 24, 20\) voxels and .* same grid_voxels_xyz"):
        Stores(two)
    with pytest.raises(InputError, match="are the same folder"):
        Stores([paths[0], paths[0] / ".." / "brains"])


# ------------------------------------------------------------------------------------------------ shares


def order_of(pair, paths, *overrides, rows=None, weights=(1, 3)):
    config = load(Config, None, settings_of(paths, *overrides, weights=weights))
    assert store_paths(config.data) == tuple(map(str, paths))
    return make_order(pair, pair.rows if rows is None else rows, config)


@pytest.mark.parametrize("sampler", ["uniform", "subject_balanced"])
def test_stores_come_in_their_shares(sampler, pair, paths):
    """15 scans a block: 4 of the first store and 11 of the second; inside each, scans or subjects by turns."""
    order = order_of(pair, paths, f"data.sampler={sampler}")
    assert order.quotas == (4, 11) and [group.name for group in order.groups] == ["1/", "2/"]
    rows = [order.row(index) for index in range(15 * 18)]
    for block in range(18):
        assert Counter(pair.number(rows[15 * block : 15 * block + 15]).tolist()) == {0: 4, 1: 11}
    for number, scans, subjects in ((0, 9, 5), (1, 6, 4)):
        mine = [row for row in rows if pair.number([row])[0] == number]
        if sampler == "uniform":
            assert sorted(mine[:scans]) == sorted(mine[scans : 2 * scans]) == sorted(set(mine))
        else:
            names = dict(zip(pair.rows.tolist(), subjects_of(pair).tolist()))
            assert len({names[row] for row in mine[:subjects]}) == subjects
            assert set(mine[: 2 * subjects]) == set(pair.rows[pair.number(pair.rows) == number].tolist())


def test_values_have_shares_inside_their_store(pair, paths):
    """The first store has T1w alone, so its quarter is T1w; of the second's, four fifths are PDw."""
    order = order_of(pair, paths, "data.sampler=weighted", "data.weights={T1w=1,PDw=4}")
    assert {group.name: (float(group.weight), quota) for group, quota in zip(order.groups, order.quotas)} == {
        "1/T1w": (1.0, 4), "2/PDw": (pytest.approx(2.4), 9), "2/T1w": (pytest.approx(0.6), 2),
    }  # fmt: skip


def test_a_store_that_would_give_nothing_is_refused(pair, paths):
    with pytest.raises(InputError, match=r"a/brains has no training scan whose contrast has a weight above 0"):
        order_of(pair, paths, "data.sampler=weighted", "data.weights={T1w=0,PDw=4}")
    with pytest.raises(InputError, match=r"b/brains has no training scan \(all its subjects are held out\)"):
        order_of(pair, paths, rows=np.arange(2, 10))


# ------------------------------------------------------------------------------------------------ a run


def state_of(config):
    """A saved state of a run with these settings."""
    return TrainState(
        step=4, cursor=16, time_s=1.0, config=config.model_dump(mode="json"), plan_hash="a", data_hash="b",
        volume_zyx=TINY_GRID_ZYX, versions={}, world_size=1, zero_stage=1, micro_batch_volumes=4, accumulation=1,
    )  # fmt: skip


def test_stores_may_move_and_nothing_else_may_change():
    def resume(*overrides, weights=(1, 3), allow=()):
        saved, now = (
            state_of(load(Config, None, settings))
            for settings in (settings_of(["a", "b"]), settings_of(["c", "d"], *overrides, weights=weights))
        )
        run_folder.check_resume(saved, now, allow)

    resume()
    for change, part in (
        ({"weights": (1, 2)}, "data.stores.1.weight: 3.0 → 2.0"),
        ({"weights": (1,)}, "data.stores: "),
    ):
        with pytest.raises(InputError, match=re.escape(part)):
            resume(**change)
    with pytest.raises(InputError, match=r"data\.sampler: uniform → subject_balanced"):
        resume("data.sampler=subject_balanced")
    with pytest.raises(InputError, match=r"data\.sampler: uniform → weighted; data\.weights\.T1w: None → 1\.0"):
        resume("data.sampler=weighted", "data.weights={T1w=1}")
    resume("data.sampler=subject_balanced", allow=("data.sampler",))


def test_a_checkpoint_of_a_version_with_fewer_settings_goes_on():
    """What it did not have counts as its default, in a group that it knew and in one that it did not."""
    config = Config()
    old = state_of(config)
    del (
        old.config["augment"],
        old.config["data"]["sampler"],
        old.config["data"]["weights"],
        old.config["data"]["stores"],
    )
    before = json.dumps(old.config)
    run_folder.check_resume(old, state_of(config), ())
    assert json.dumps(old.config) == before
    with pytest.raises(InputError, match=r"augment\.gamma_fraction: 0\.0 → 0.5"):
        run_folder.check_resume(old, state_of(load(Config, None, ("augment.gamma_fraction=0.5",))), ())


def test_a_run_over_two_stores_and_after_they_moved(paths, tiny_config, tmp_path):
    """Shares and places stand in run.json; with its stores renamed it goes on bit for bit."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    base = ("pretrain", tiny_config, "log.holdout_every_steps=1000", "optim.schedule=cooldown")
    run_ranks(*base, f"run.dir={run}", *settings_of(paths), "train.num_steps=4", logs=tmp_path)
    about = json.loads((run / "run.json").read_text())
    assert [(one["path"], one["weight"], one["scans"]) for one in about["stores"]] == [
        (str(paths[0]), 1.0, 9), (str(paths[1]), 3.0, 6),
    ]  # fmt: skip
    training = sum(one["training_scans"] for one in about["stores"])
    assert (about["store"]["scans"], about["store"]["training_scans"]) == (15, training)
    dealt = [group["samples_of_a_block"] for group in about["order"]["groups"]]
    assert sum(dealt) == training and abs(dealt[0] - training / 4) <= 0.5

    more = (*base, "train.num_steps=6")
    moved = [shutil.copytree(path, tmp_path / f"elsewhere-{number}") for number, path in enumerate(paths)]
    run_ranks(*more, f"run.dir={run}", *settings_of(moved), logs=tmp_path)
    run_ranks(*more, f"run.dir={whole}", *settings_of(paths), logs=tmp_path)
    assert losses(run) == losses(whole) and max(losses(run)) == 6


def test_a_dry_run_reads_the_grid_of_several(paths, tiny_config):
    text = dry_run_text(load(Config, tiny_config, settings_of(paths)))
    assert f"{TINY_GRID_ZYX} voxels z, y, x (from {paths[0]})" in text
