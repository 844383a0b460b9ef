"""The store's contract: what goes in comes out, the bytes depend on nothing else, and no damage reads as data."""

import copy as copy_module
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from conftest import FULL
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05.image import Image
from xxhash import xxh3_128_hexdigest

from brainscale import store, store_files
from brainscale.prep_plan import Plan
from brainscale.settings import InputError
from brainscale.store import StoreDamage

GRID_ZYX = (8, 12, 10)
ROWS = 7
REFUSED_ROW, COPY_ROW, COPIED_ROW = 2, 5, 1
SHARD = "volumes/c/1/0/0/0"


def make_plan(**settings) -> Plan:
    return Plan(**{"grid_voxels_xyz": GRID_ZYX[::-1], "foreground_cell_voxels": 2, "shard_volumes": 3, **settings})


def make_arrays(plan: Plan, grid_zyx=GRID_ZYX, rows=ROWS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    volumes = (rng.normal(size=(rows, *grid_zyx)).cumsum(axis=-1) * 20 + 100).astype(plan.dtype)
    cells = tuple(-(-size // plan.foreground_cell_voxels) for size in grid_zyx)
    foreground = rng.integers(0, 256, (rows, *cells), dtype=np.uint8)
    if rows == ROWS:
        volumes[REFUSED_ROW], foreground[REFUSED_ROW] = 0, 0
        volumes[COPY_ROW] = volumes[COPIED_ROW]
    return volumes, foreground


def make_record(row: int, volume: np.ndarray, refused: bool = False) -> dict:
    record = {"row": row, "id": f"sub-{row:02d}_T1w", "source": f"sub-{row:02d}/anat/sub-{row:02d}_T1w.nii.gz"}
    if refused:
        return record | {"status": "refused", "reason": "does_not_fit", "sentence": "It loses 40 % of its foreground."}
    affine = [float(v) for v in np.diag([1.0, 2.0, 3.0, 1.0]).ravel()]
    return record | {
        "status": "ok" if row else "warning",
        "reason": "",
        "sentence": "",
        "warnings": [] if row else ["cropped", "no_contrast"],
        "source_xxh3_128": f"{row:032x}",
        "voxels_xxh3_128": xxh3_128_hexdigest(np.ascontiguousarray(volume)),
        "subject": f"{row:02d}",
        "session": "",
        "contrast": "T1w",
        "header_base64": "AAAA",
        "affine_source": affine,
        "affine_stored": [v + row / 3 for v in affine],
        "spacing_source_mm_xyz": [1.0, 2.0, 3.0],
        "shape_source_xyz": [10, 12, 8],
        "crop_voxels_xyz": [0.5, -1.0, 0.0],
        "cropped_fraction": 0.1 * row,
        "scale": 1 / 3,
        "offset": -1024.0,
        "background_code": 0,
        "mean": 100.0 + row,
        "std": 20.0,
        "clip_low": 1.0,
        "clip_high": 900.0,
        "foreground_threshold": 12.5,
        "foreground_fraction": 0.4,
        "skull_stripped": True,
        "foreground_method": "nonzero",
        "mask_source": "",
        "duplicate_of": "",
        "participant": {"age": str(20 + row)} if row % 2 else {"age": str(20 + row), "sex": "F"},
    }


def write_one(path: Path, plan: Plan, shard: int) -> None:
    volumes, foreground = make_arrays(plan)
    rows = store.shard_rows(plan, ROWS, shard)
    records = [make_record(row, volumes[row], row == REFUSED_ROW) for row in rows]
    store.write_shard(path, shard, volumes[rows], foreground[rows], records)


def make_store(path: Path, plan: Plan | None = None, shards=(0, 1, 2)) -> Path:
    plan = plan or make_plan()
    store.create(path, plan, GRID_ZYX, ROWS)
    for shard in shards:
        write_one(path, plan, shard)
    store.finish(path)
    return path


def tree(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A healthy store; tests that break one copy it first."""
    return make_store(tmp_path_factory.mktemp("store") / "whole")


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


# ---------------------------------------------------------------------------------------------- what comes out


@settings(max_examples=15, deadline=None)
@given(
    grid=st.tuples(*[st.integers(1, 9)] * 3),
    rows=st.integers(1, 9),
    shard=st.integers(0, 11),
    dtype=st.sampled_from(["int16", "uint8", "float32"]),
    codec=st.sampled_from(["lz4", "zstd"]),
    cut=st.sampled_from(["rows", "volume", 1, 2, 3]),
    seed=st.integers(0, 2**16),
)
def test_both_readers_return_what_was_written(tmp_path_factory, grid, rows, shard, dtype, codec, cut, seed):
    cell, chunk = 3, cut
    if cut == "rows":
        grid = (grid[0] * 5, grid[1] * 7, grid[2])
    elif cut != "volume":
        grid, chunk = tuple(size * cut for size in grid), (cut, cut, cut)
    settings = {"dtype": dtype, "codec": codec, "shard_volumes": shard, "chunk_voxels_zyx": chunk}
    plan = Plan(grid_voxels_xyz="largest", foreground_cell_voxels=cell, **settings)
    path = tmp_path_factory.mktemp("any") / "store"
    volumes, foreground = make_arrays(plan, grid, rows)
    store.create(path, plan, grid, rows)
    size = store.shard_volumes(plan, rows)
    for number in range(-(-rows // size)):
        own = store.shard_rows(plan, rows, number)
        store.write_shard(path, number, volumes[own], foreground[own], [make_record(r, volumes[r]) for r in own])
    store.finish(path)
    assert store.damage(path, deep=True) == []

    opened = store.open_store(path)
    rng = np.random.default_rng(seed)
    order = rng.integers(0, rows, size=5)
    np.testing.assert_array_equal(opened.volumes(order), volumes[order])
    np.testing.assert_array_equal(opened.foreground(order), foreground[order])
    np.testing.assert_array_equal(zarr.open_array(path / "volumes", mode="r")[:], volumes)
    np.testing.assert_array_equal(zarr.open_array(path / "foreground", mode="r")[:], foreground)
    corner = tuple(int(rng.integers(0, size)) for size in grid)
    box = tuple(int(rng.integers(1, size - c + 1)) for c, size in zip(corner, grid))
    inside = tuple(slice(c, c + s) for c, s in zip(corner, box))
    np.testing.assert_array_equal(opened.crop(int(order[0]), corner, box), volumes[(order[0], *inside)])


def test_arrays_are_ordinary_and_own_their_memory(whole):
    opened = store.open_store(whole)
    for array in (opened.volumes([0, 3]), opened.foreground([0]), opened.crop(1, (1, 2, 3), (4, 5, 6))):
        assert type(array) is np.ndarray
        assert array.flags.c_contiguous and array.flags.owndata and array.flags.writeable
    assert opened.volumes([]).shape == (0, *GRID_ZYX)


def test_what_an_opened_store_says(whole):
    opened = store.open_store(whole)
    assert opened.plan == make_plan() and opened.plan_hash == make_plan().hash()
    assert opened.volume_zyx == GRID_ZYX and opened.dtype == np.int16
    assert opened.rows.dtype == np.int64
    assert opened.rows.tolist() == [0, 1, 3, 4, 5, 6]
    assert opened.refused == [make_record(REFUSED_ROW, np.empty(0), refused=True)]
    assert opened.num_bytes == sum(len(data) for name, data in tree(whole).items() if name != "COMPLETE.json")


def test_columns_come_back_bit_for_bit(whole):
    opened = store.open_store(whole)
    records = [make_record(row, make_arrays(make_plan())[0][row]) for row in opened.rows]
    changed = {"status", "warnings", "duplicate_of", "participant"}
    for name in set(records[0]) - changed:
        assert opened.column(name).tolist() == [record[name] for record in records], name
    assert opened.column("affine_stored").shape == (6, 16) and opened.column("affine_stored").dtype == np.float64
    assert opened.column("participant_age").tolist() == ["20", "21", "23", "24", "25", "26"]
    assert opened.column("participant_sex").tolist() == ["F", None, None, "F", None, "F"]
    with pytest.raises(InputError, match=r"no column 'agee'.*participant_age"):
        opened.column("agee")


def test_equal_voxels_are_named_as_duplicates(whole):
    opened = store.open_store(whole)
    copied = opened.rows == COPY_ROW
    assert opened.column("duplicate_of")[copied] == [f"sub-{COPIED_ROW:02d}_T1w"]
    assert opened.column("warnings")[copied][0] == ["duplicate_of"]
    assert opened.column("status").tolist() == ["warning", "ok", "ok", "ok", "warning", "ok"]
    assert set(opened.column("duplicate_of")[~copied]) == {""}


def test_equal_codes_of_other_scale_are_no_duplicates():
    """A scan and its negative are stored in the same codes; they are not the same voxels."""
    scans = [{"id": name, "status": "ok", "warnings": [], "voxels_xxh3_128": "a" * 32, "scale": scale, "offset": 0.0}
             for name, scale in (("one", 2.0), ("negative", -2.0), ("again", 2.0))]  # fmt: skip
    store_files.mark_duplicates(scans, {})
    assert [scan.get("duplicate_of", "") for scan in scans] == ["", "", "one"]


@pytest.mark.parametrize("row", [REFUSED_ROW, -1, ROWS])
def test_a_row_that_is_not_there_is_an_error(whole, row):
    opened = store.open_store(whole)
    for read in (opened.volumes, opened.foreground, lambda rows: opened.crop(rows[0], (0, 0, 0), (1, 1, 1))):
        with pytest.raises(IndexError, match=f"row {row} "):
            read([row])


@pytest.mark.parametrize("corner, size", [((-1, 0, 0), (2, 2, 2)), ((0, 0, 5), (2, 2, 6)), ((0, 0, 0), (1, 0, 1))])
def test_a_crop_that_leaves_the_grid_is_an_error(whole, corner, size):
    with pytest.raises(IndexError, match="leaves the grid"):
        store.open_store(whole).crop(0, corner, size)


def _first_voxels(opened: store.Store) -> bytes:
    return opened.volumes([0, 4]).tobytes()


def test_a_store_goes_to_another_process_and_serves_many_threads(whole):
    opened = store.open_store(whole)
    expected = {row: opened.volumes([row]).tobytes() for row in opened.rows.tolist()}
    assert len(pickle.dumps(opened)) < 5000
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(_first_voxels, (opened,)) == expected[0] + expected[4]
    fresh = copy_module.copy(opened)
    assert "_arrays" in vars(opened) and "_arrays" not in vars(fresh)
    rows = random.Random(0).choices(opened.rows.tolist(), k=200)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda row: fresh.volumes([row]).tobytes(), rows)) == [expected[row] for row in rows]


@pytest.mark.parametrize(
    "spacing, scale, unit", [((1.0, 2.0, 3.0), [1, 3, 2, 1], "millimeter"), ("native", [1, 1, 1, 1], None)]
)
def test_the_cohort_is_valid_ome_zarr(tmp_path, spacing, scale, unit):
    path = make_store(tmp_path / "s", make_plan(spacing_mm_xyz=spacing))
    image = Image.from_zarr(zarr.open_group(path, mode="r"))
    (multiscale,) = image.ome_attributes.multiscales
    assert [axis.name for axis in multiscale.axes] == ["t", "z", "y", "x"]
    assert [getattr(axis, "unit", None) for axis in multiscale.axes[1:]] == [unit] * 3
    assert multiscale.datasets[0].coordinateTransformations[0].scale == scale
    assert zarr.open_array(path / "volumes", mode="r").metadata.dimension_names == ("t", "z", "y", "x")


# ---------------------------------------------------------------------------------------------- one set of bytes


def test_bytes_do_not_depend_on_order_runs_or_restarts(whole, tmp_path):
    assert tree(make_store(tmp_path / "reversed", shards=(2, 1, 0))) == tree(whole)
    assert tree(make_store(tmp_path / "twice", shards=(1, 0, 1, 2, 0))) == tree(whole)


class Stop(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def stopped_at(stop: int, work: Callable, *arguments, kill: bool = False) -> int:
    """Do the work, but stop before the n-th call that changes the disk; returns the calls seen."""
    calls = 0

    def watch(frame, event, called):
        nonlocal calls
        if event == "c_call" and called in (os.fsync, os.replace, os.unlink, os.mkdir, os.rmdir):
            calls += 1
            if calls == stop and kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if calls == stop:
                raise Stop

    sys.setprofile(watch)
    try:
        work(*arguments)
    except Stop:
        pass
    finally:
        sys.setprofile(None)
    return calls


def go_on(path: Path) -> dict[str, bytes]:
    """What the next conversion does: write the shards that are not finished, then finish."""
    store.create(path, make_plan(), GRID_ZYX, ROWS)
    for shard in {0, 1, 2} - store.finished_shards(path):
        write_one(path, make_plan(), shard)
    store.finish(path)
    return tree(path)


def test_a_stop_anywhere_is_made_good_by_the_next_run(whole, tmp_path):
    """The same bytes, and no litter, wherever the first run ended."""
    calls = stopped_at(0, make_store, tmp_path / "counted")
    assert calls > 80
    every = 1 if FULL else 5
    for stop in (*range(1, calls - 30, every), *range(calls - 30, calls + 1, 1 + every // 4)):
        path = tmp_path / f"stopped-{stop}"
        assert stopped_at(stop, make_store, path) == stop
        assert go_on(path) == tree(whole), stop
        assert not (path / "journal").exists()
        shutil.rmtree(path)


def test_a_killed_process_is_made_good_by_the_next_run(whole, tmp_path):
    code = "import sys, pathlib, test_store as t; t.stopped_at(60, t.make_store, pathlib.Path(sys.argv[1]), kill=True)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert 0 < len(store.finished_shards(tmp_path / "s")) < 3
    assert go_on(tmp_path / "s") == tree(whole)


def test_a_shard_is_not_finished_while_it_is_written_again(tmp_path):
    plan, path = make_plan(), tmp_path / "s"
    store.create(path, plan, GRID_ZYX, ROWS)
    write_one(path, plan, 1)
    assert store.finished_shards(path) == {1}
    stopped_at(4, write_one, path, plan, 1)
    assert store.finished_shards(path) == set()


def test_finish_and_create_again_change_nothing(copy, whole):
    store.create(copy, make_plan(), GRID_ZYX, ROWS)
    store.finish(copy)
    assert tree(copy) == tree(whole)
    assert store.finished_shards(copy) == {0, 1, 2}


def test_a_lost_shard_can_be_written_again(copy, whole):
    (copy / SHARD).unlink()
    assert store.finished_shards(copy) == {0, 2}
    write_one(copy, make_plan(), 1)
    store.finish(copy)
    assert tree(copy) == tree(whole)


def test_a_shard_written_again_with_other_voxels_is_an_error(copy):
    volumes, foreground = make_arrays(make_plan())
    records = [make_record(row, volumes[row]) for row in (3, 4, 5)]
    store.write_shard(copy, 1, volumes[3:6] + np.int16(1), foreground[3:6], records)
    with pytest.raises(StoreDamage, match=SHARD):
        store.finish(copy)


def test_chunks_of_rows_are_at_most_sixteen_by_sixteen():
    for grid, chunk in (((160, 192, 160), (16, 16, 160)), ((80, 96, 80), (16, 16, 80)), ((44, 188, 7), (11, 4, 7))):
        assert store.chunk_zyx(Plan(), grid) == chunk
    assert store.chunk_zyx(Plan(chunk_voxels_zyx="volume"), (44, 188, 7)) == (44, 188, 7)


def test_shards_follow_the_plan():
    assert [store.shard_volumes(Plan(), rows) for rows in (1, 127, 128, 6400)] == [1, 1, 2, 32]
    assert [list(store.shard_rows(make_plan(), ROWS, shard)) for shard in range(4)] == [[0, 1, 2], [3, 4, 5], [6], []]


# ---------------------------------------------------------------------------------------------- what is refused


def test_finish_refuses_missing_shards(tmp_path):
    with pytest.raises(InputError, match="2 of 3 shards are not written"):
        make_store(tmp_path / "s", shards=(1,))
    assert store.finished_shards(tmp_path / "s") == {1}
    (tmp_path / "s" / SHARD).write_bytes(b"")
    assert store.finished_shards(tmp_path / "s") == set()


def test_create_refuses_another_plan_grid_or_folder(tmp_path):
    path = tmp_path / "s"
    store.create(path, make_plan(), GRID_ZYX, ROWS)
    before = tree(path)
    with pytest.raises(InputError, match="codec was 'lz4', is now 'zstd'"):
        store.create(path, make_plan(codec="zstd"), GRID_ZYX, ROWS)
    with pytest.raises(InputError, match="7 scans"):
        store.create(path, make_plan(), GRID_ZYX, ROWS + 1)
    with pytest.raises(InputError, match="7 scans"):
        store.create(path, make_plan(), (8, 12, 12), ROWS)
    assert tree(path) == before
    with pytest.raises(InputError, match="at least one scan"):
        store.create(tmp_path / "none", make_plan(), GRID_ZYX, 0)
    with pytest.raises(InputError, match=r'chunk_voxels_zyx \(7, 7, 7\) does not divide .*choose "rows"'):
        store.create(tmp_path / "none", make_plan(chunk_voxels_zyx=(7, 7, 7)), GRID_ZYX, ROWS)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no store"):
        store.create(tmp_path / "home", make_plan(), GRID_ZYX, ROWS)
    with pytest.raises(InputError, match="is a file"):
        store.create(tmp_path / "home" / "thesis.txt", make_plan(), GRID_ZYX, ROWS)


def test_write_shard_refuses_what_is_not_its_own(tmp_path):
    path = tmp_path / "s"
    store.create(path, make_plan(), GRID_ZYX, ROWS)
    volumes, foreground = make_arrays(make_plan())
    records = [make_record(row, volumes[row]) for row in range(3)]
    for arrays, given_records, words in (
        ((volumes[:2], foreground[:3]), records, "takes int16"),
        ((volumes[:3].astype(np.float32), foreground[:3]), records, "got float32"),
        ((volumes[:3], foreground[:3, :1]), records, "foreground takes uint8"),
        ((volumes[:3], foreground[:3]), records[::-1], r"rows \[0, 1, 2\], got \[2, 1, 0\]"),
        ((volumes[:3], foreground[:3]), [*records[:2], {**records[2], "ages": 3}], "ages"),
    ):
        with pytest.raises(InputError, match=words):
            store.write_shard(path, 0, *arrays, given_records)
    assert store.finished_shards(path) == set()


def test_open_refuses_what_is_no_finished_store(tmp_path, copy):
    (tmp_path / "empty").mkdir()
    (copy / "COMPLETE.json").unlink()
    for path, words in (
        (tmp_path / "nowhere", "is not a folder"),
        (tmp_path / "empty", "holds no store"),
        (copy, "run data_prep/to_zarr.py again as before to finish it"),
    ):
        with pytest.raises(InputError, match=words):
            store.open_store(path)
        (sentence,) = store.damage(path, deep=True)
        assert words in sentence


@pytest.mark.parametrize("file", [SHARD, "foreground/c/2/0/0/0"])
def test_open_refuses_missing_empty_and_short_shards(copy, file):
    data = (copy / file).read_bytes()
    for content, words in (
        (b"", "has 0 bytes"),
        (data[: len(data) // 2], "bytes where"),
        (data + b"\0", "bytes where"),
    ):
        (copy / file).write_bytes(content)
        with pytest.raises(InputError, match=f"{file} {words}" if words == "has 0 bytes" else f"{file} has"):
            store.open_store(copy)
    (copy / file).unlink()
    with pytest.raises(InputError, match=f"{file} is missing"):
        store.open_store(copy)


def test_open_refuses_an_index_without_a_row(copy):
    """Both libraries read such a row as zeros by default, since the index's checksum holds."""
    data = bytearray((copy / SHARD).read_bytes())
    index = len(data) - (16 * 3 + 4)
    data[index + 16 : index + 32] = b"\xff" * 16
    data[-4:] = google_crc32c.value(bytes(data[index:-4])).to_bytes(4, "little")
    (copy / SHARD).write_bytes(data)
    assert not zarr.open_array(copy / "volumes", mode="r")[4].any()
    with pytest.raises(StoreDamage, match=rf"{SHARD} .*no data for rows \[4\]"):
        store.open_store(copy)
    with pytest.raises(StoreDamage, match=SHARD):
        store.Store(copy).volumes([4])
    assert any("rows [4] cannot be decoded" in sentence for sentence in store.damage(copy, deep=True))


def test_open_refuses_an_index_that_fails_its_checksum(copy):
    flip(copy / SHARD, 8 * ((copy / SHARD).stat().st_size - 20))
    with pytest.raises(StoreDamage, match=f"{SHARD} .*checksum"):
        store.open_store(copy)


@pytest.mark.parametrize("file", [*store.METADATA, "COMPLETE.json"])
def test_open_refuses_flipped_metadata(copy, file):
    bits = 8 * (copy / file).stat().st_size
    for bit in random.Random(file).sample(range(bits), 4):
        flip(copy / file, bit)
        with pytest.raises(InputError, match=f"{file} is"):
            store.open_store(copy)
        flip(copy / file, bit)
    assert store.open_store(copy).rows.size == 6


def test_a_shard_lost_or_flipped_after_opening_is_an_error_that_names_it(copy):
    opened = store.open_store(copy)
    flip(copy / SHARD, 8 * 100)
    with pytest.raises(StoreDamage, match=f"row 3 cannot be read from .*{SHARD}"):
        opened.volumes([0, 3])
    (copy / SHARD).unlink()
    for read in (lambda: opened.volumes([5]), lambda: opened.crop(5, (0, 0, 0), (2, 2, 2))):
        with pytest.raises(StoreDamage, match=SHARD):
            read()


def test_deep_check_finds_every_flipped_bit(copy):
    rng = random.Random(0)
    files = sorted(tree(copy))
    assert len(files) == 13
    for number in range(208):
        file = copy / files[number % len(files)]
        bit = rng.randrange(8 * file.stat().st_size)
        flip(file, bit)
        sentences = store.damage(copy, deep=True)
        assert len(sentences) == 1 and files[number % len(files)] in sentences[0], (file, bit, sentences)
        flip(file, bit)
    assert store.damage(copy, deep=True) == []


def test_damage_names_every_file(copy):
    (copy / SHARD).unlink()
    (copy / "foreground/c/0/0/0/0").write_bytes(b"")
    sentences = store.damage(copy, deep=False)
    assert len(sentences) == 2
    with pytest.raises(StoreDamage, match=r"1 more: brainscale doctor"):
        store.open_store(copy)
    deep = store.damage(copy, deep=True)
    assert any("is missing; rows [3, 4, 5] cannot be decoded" in sentence for sentence in deep)


def test_completion_record_lists_sizes_and_hashes(whole):
    complete = json.loads((whole / "COMPLETE.json").read_bytes())
    contents = tree(whole)
    assert set(complete["files"]) == set(contents) - {"COMPLETE.json"}
    for name, entry in complete["files"].items():
        assert entry == {"bytes": len(contents[name]), "xxh3_128": xxh3_128_hexdigest(contents[name])}
    assert (complete["rows"], complete["grid_zyx"]) == (ROWS, list(GRID_ZYX))
    assert complete["plan_hash"] == make_plan().hash()


def test_importing_the_store_imports_nothing_heavy():
    code = "import sys, brainscale.store; print([m for m in ('torch', 'deepspeed', 'nilearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
