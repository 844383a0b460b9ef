"""Conversion end to end: what lands in the store, the same bytes however it was run, and every way it can stop."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import FULL, ROOT

from brainscale import store as stores
from brainscale.prep_plan import Plan
from brainscale.settings import InputError, load
from brainscale_data_prep import discover, nifti
from brainscale_data_prep.convert import Summary, TooManyRefused, _check_refused, convert, report_line
from brainscale_data_prep.ownership import owner
from brainscale_data_prep.preprocess import prepare
from brainscale_data_prep.shards import Task, convert_shard

PLAN = Plan(
    grid_voxels_xyz=(16, 20, 16), spacing_mm_xyz=(2, 2, 2), shard_volumes=2, max_cropped_fraction=1.0, min_extent_mm=0
)
RUN = """
import sys
from pathlib import Path
from brainscale.prep_plan import Plan
from brainscale_data_prep.convert import convert
from brainscale_data_prep.pool import Stopped
limit = int(sys.argv[5])
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    task = tuple(map(int, sys.argv[6].split("/")))
    convert(Path(sys.argv[1]), Path(sys.argv[2]), Plan.model_validate_json(sys.argv[3]), int(sys.argv[4]), shard=task)
except Stopped as stopped:
    print(stopped)
    sys.exit(75)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Eleven small scans, some resampled and some turned, one equal to another, and one damaged file."""
    root, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for number in range(11):
        shape = (20 + number % 3, 22, 18)
        distance = sum(((i - (n - 1) / 2) / (n / 2.4)) ** 2 for i, n in zip(np.indices(shape), shape))
        voxels = np.where(distance < 1, rng.integers(100, 1000, shape), 0).astype(np.int16)
        affine = np.diag([(-1) ** number * 2.0, 2.0, 2.0 - 0.3 * (number % 2), 1])
        nifti.write(root / f"sub-{number:02d}_T1w.nii.gz", voxels, affine)
    (root / "sub-11_T1w.nii.gz").write_bytes((root / "sub-03_T1w.nii.gz").read_bytes())
    (root / "sub-12_T1w.nii.gz").write_bytes((root / "sub-04_T1w.nii.gz").read_bytes()[:-3])
    (root / "participants.tsv").write_text("participant_id\tage\tdiary\nsub-00\t41\tx\nsub-05\t29\ty\n")
    return root


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    store = tmp_path_factory.mktemp("unbroken") / "store"
    return store, convert(source, store, PLAN, workers=1)


def tree(store):
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def start(source, store, workers=1, limit=0, task="0/1"):
    arguments = (source, store, PLAN.model_dump_json(), workers, limit, task)
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_shards(process, store, number):
    """Until so many shards are recorded, or the process has ended."""
    while process.poll() is None and len(list(store.glob("journal/shard-*.json"))) < number:
        try:
            process.wait(timeout=0.002)
        except subprocess.TimeoutExpired:
            pass


def test_the_store_holds_what_preprocessing_made(source, unbroken):
    store, summary = unbroken
    opened = stores.open_store(store)
    assert opened.rows.tolist() == list(range(12)) and [r["row"] for r in opened.refused] == [12]
    assert opened.refused[0]["reason"] == "truncated" and opened.refused[0]["source"] == "sub-12_T1w.nii.gz"
    volumes, cells = opened.volumes(opened.rows), opened.foreground(opened.rows)
    for row in (0, 1, 7):
        prepared = prepare(nifti.read(source / f"sub-{row:02d}_T1w.nii.gz"), PLAN, (16, 20, 16))
        np.testing.assert_array_equal(volumes[row], prepared.volume_zyx)
        np.testing.assert_array_equal(cells[row], prepared.foreground_cells_zyx)
        assert opened.column("scale")[row] == prepared.record["scale"]
    assert opened.column("subject")[5] == "sub-05" and opened.column("contrast")[5] == "T1w"
    assert opened.column("participant_age")[5] == "29" and opened.column("participant_age")[6] is None
    assert opened.column("duplicate_of")[11] == "sub-03_T1w"
    with pytest.raises(InputError, match="diary"):
        opened.column("participant_diary")
    assert (summary.taken, summary.refused, summary.reasons["truncated"], summary.volumes_now) == (12, 1, 1, 13)
    assert summary.warnings["duplicate_of"] == 1
    text = report_line(summary)
    assert "12 scans taken, 1 refused" in text and "1 truncated" in text and "refused.jsonl" in text
    assert not list(store.rglob("*.partial")) and not (store / ".lock").exists()
    assert str(source).encode() not in b"".join(tree(store).values())


def test_two_workers_and_two_tasks_give_the_same_bytes(source, unbroken, tmp_path):
    convert(source, tmp_path / "two", PLAN, workers=2)
    assert tree(tmp_path / "two") == tree(unbroken[0])
    first = convert(source, tmp_path / "tasks", PLAN, workers=1, shard=(1, 2))
    assert not first.finished and "the last one finishes" in report_line(first)
    with pytest.raises(InputError, match="not finished"):
        stores.open_store(tmp_path / "tasks")
    assert convert(source, tmp_path / "tasks", PLAN, workers=1, shard=(0, 2)).finished
    assert tree(tmp_path / "tasks") == tree(unbroken[0])


@pytest.mark.slow
def test_a_killed_conversion_continues_to_the_same_bytes(source, unbroken, tmp_path):
    store = tmp_path / "store"
    for number_of_shards, whole_group in ((1, True), (3, False), (5, True)):
        process = start(source, store, workers=1 if whole_group else 2)
        wait_for_shards(process, store, number_of_shards)
        if process.poll() is None:
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
    summary = convert(source, store, PLAN, workers=1)
    assert summary.finished and (summary.taken, summary.refused) == (12, 1)
    assert tree(store) == tree(unbroken[0])
    assert summary.volumes_now < 13


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "tasks"), [(1, ["0/1"]), (3, ["0/1"]), (1, ["0/2", "1/2"])])
def test_kills_at_random_moments(source, unbroken, tmp_path, workers, tasks):
    """Conversions killed again and again, alone or two tasks at once, end in the bytes of an unbroken one."""
    rng, store = random.Random(workers + len(tasks)), tmp_path / "store"
    killed = 0
    while killed < (20 if FULL else 5):
        if (store / "COMPLETE.json").exists():
            shutil.rmtree(store)
        running = [start(source, store, workers, task=task) for task in tasks]
        try:
            running[0].wait(timeout=rng.uniform(0.8, 3.0))
        except subprocess.TimeoutExpired:
            pass
        for process in running:
            killed += process.poll() is None
            process.kill()
            process.communicate()
    running = [start(source, store, workers, task=task) for task in tasks]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert tree(store) == tree(unbroken[0])


@pytest.mark.slow
def test_two_tasks_at_once_build_one_store(source, unbroken, tmp_path):
    running = [start(source, tmp_path / "store", task=task) for task in ("0/2", "1/2")]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert tree(tmp_path / "store") == tree(unbroken[0])


@pytest.mark.slow
def test_ctrl_c_and_a_full_disk_stop_with_a_sentence_and_can_be_continued(source, unbroken, tmp_path):
    store = tmp_path / "store"
    full = start(source, store, limit=9000)
    output, errors = full.communicate()
    assert full.returncode == 75 and "the disk is full" in output and "continues" in output, errors
    convert(source, store, PLAN, workers=1)
    assert tree(store) == tree(unbroken[0])

    many, store = tmp_path / "many", tmp_path / "interrupted"  # so many that it cannot end before the signal comes
    many.mkdir()
    for path, copy in itertools.product(source.glob("*.nii.gz"), range(8)):
        (many / path.name.replace("sub-", f"sub-{copy}x")).write_bytes(path.read_bytes())
    interrupted = start(many, store)
    wait_for_shards(interrupted, store, 1)
    os.killpg(interrupted.pid, signal.SIGINT)
    output, errors = interrupted.communicate()
    assert interrupted.returncode == 75 and "interrupted" in output, errors
    assert not (store / ".lock").exists() and not (store / ".owners").exists()
    convert(many, store, PLAN, workers=1)
    convert(many, tmp_path / "whole", PLAN, workers=1)
    assert tree(store) == tree(tmp_path / "whole")


def test_a_finished_store_is_left_alone_and_refuses_other_plans_and_scans(source, unbroken, tmp_path):
    store, before = unbroken[0], tree(unbroken[0])
    again = convert(source, store, PLAN, workers=1)
    assert again.finished and again.volumes_now == 0 and again.taken == 12
    assert "already done" in report_line(again)
    with pytest.raises(InputError, match="another plan"):
        convert(source, store, PLAN.model_copy(update={"dtype": "uint8"}), workers=1)
    other = tmp_path / "other"
    other.mkdir()
    for path in source.iterdir():
        (other / path.name.replace("sub-07", "sub-77")).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="made from other scans"):
        convert(other, store, PLAN, workers=1)
    assert tree(store) == before


def test_a_source_that_changes_half_way_is_an_error(source, tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    for number in range(4):
        (root / f"{number}.nii.gz").write_bytes((source / f"sub-0{number}_T1w.nii.gz").read_bytes())
    convert(root, tmp_path / "store", PLAN, workers=1, shard=(0, 2))
    (root / "0.nii.gz").rename(root / "00.nii.gz")
    with pytest.raises(InputError, match="list of scans has changed"):
        convert(root, tmp_path / "store", PLAN, workers=1)


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [((0, 1), (0, 1), True), ((0, 1), (1, 3), True), ((1, 4), (0, 2), False), ((2, 4), (0, 2), True)],
)
def test_a_second_writer_of_a_shard_is_refused(tmp_path, first, second, meet):
    with owner(tmp_path, first):
        if meet:
            with pytest.raises(InputError, match="another process is converting"), owner(tmp_path, second):
                pass
        else:
            with owner(tmp_path, second):
                pass
    with owner(tmp_path, second):
        pass
    assert not list(tmp_path.iterdir())


def test_a_budget_is_what_it_says_in_decimals():
    """0.29 × 100 is a little below 29 in binary."""
    summary = Summary(refused=29, taken=71)
    _check_refused(summary, 100, 0.29)
    with pytest.raises(TooManyRefused, match="more than the 28"):
        _check_refused(summary, 100, 0.28)


def test_files_that_a_network_file_system_leaves_among_the_locks_do_no_harm(tmp_path):
    with owner(tmp_path, (0, 2)):
        (tmp_path / ".owners" / ".nfs0001").touch()
        with owner(tmp_path, (1, 2)):
            pass
    assert [path.name for path in (tmp_path / ".owners").iterdir()] == [".nfs0001"]


def test_a_finished_store_with_damaged_metadata_is_named(source, unbroken, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(unbroken[0], store)
    file = store / "volumes" / "zarr.json"
    data = bytearray(file.read_bytes())
    data[40] ^= 0x80
    file.write_bytes(data)
    with pytest.raises(stores.StoreDamage, match=r"volumes/zarr\.json is not what was written .*; restore the file"):
        convert(source, store, PLAN, workers=1)


def test_the_lock_of_a_dead_process_is_taken_over(source, unbroken, tmp_path):
    store = tmp_path / "store"
    process = start(source, store)
    wait_for_shards(process, store, 1)
    with pytest.raises(InputError, match="another process is converting"):
        convert(source, store, PLAN, workers=1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (store / ".owners").exists()
    convert(source, store, PLAN, workers=1)
    assert tree(store) == tree(unbroken[0])


def test_the_refusal_budget_holds(source, unbroken, tmp_path):
    store = tmp_path / "store"
    with pytest.raises(TooManyRefused, match=r"1 of 13 scans are refused \(1 truncated\), more than the 5.0%"):
        convert(source, store, PLAN, workers=1, max_refused=0.05)
    assert not (store / "COMPLETE.json").exists()
    listed = [json.loads(line) for line in (store / "refused.jsonl").read_text().splitlines()]
    assert [(scan["source"], scan["reason"]) for scan in listed] == [("sub-12_T1w.nii.gz", "truncated")]
    assert convert(source, store, PLAN, workers=1, max_refused=0.10).volumes_now < 13
    assert tree(store) == tree(unbroken[0])


def test_a_source_without_one_good_scan_makes_no_store(source, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.nii.gz").write_bytes((source / "sub-12_T1w.nii.gz").read_bytes())
    with pytest.raises(TooManyRefused, match="all 1 scans are refused"):
        convert(tmp_path / "source", tmp_path / "store", PLAN, workers=1)
    assert not (tmp_path / "store" / "COMPLETE.json").exists()
    (tmp_path / "source" / "a.nii.gz").write_bytes(b"no header")
    with pytest.raises(TooManyRefused, match=r"none of the 1 scans can be taken; the first: a\.nii\.gz: "):
        convert(tmp_path / "source", tmp_path / "other", load(Plan, ROOT / "configs/prep/identity.toml"), workers=1)


def test_any_failure_of_one_scan_is_its_refusal(source, tmp_path):
    scans = discover.find(source).scans[:2]
    stores.create(tmp_path / "store", PLAN, (16, 20, 16), 2)
    broken = replace(scans[0], path=None)
    records, _ = convert_shard(Task(tmp_path / "store", 0, PLAN, (16, 20, 16), range(2), [broken, scans[1]]))
    assert [r["reason"] for r in records] == ["unreadable", ""] and records[1]["status"] != "refused"
    assert "AttributeError" in records[0]["sentence"]


def test_not_enough_room_is_said_before_anything_is_written(source, tmp_path):
    plan = Plan(grid_voxels_xyz=(40000, 40000, 40000))
    with pytest.raises(InputError, match="GB free"):
        convert(source, tmp_path / "store", plan, workers=1)
    assert not (tmp_path / "store").exists()


def test_the_command_converts_with_the_identity_plan(source, tmp_path):
    command = [sys.executable, str(ROOT / "data_prep/to_zarr.py"), str(source), str(tmp_path / "store")]
    options = ["--prep", str(ROOT / "configs/prep/identity.toml"), "--workers", "1", "min_extent_mm=0"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 scans taken, 1 refused" in done.stdout
    opened = stores.open_store(tmp_path / "store")
    assert opened.volume_zyx == (20, 24, 24)
    scan = nifti.read(source / "sub-02_T1w.nii.gz")
    x, y, z = (-int(first) for first in opened.column("crop_voxels_xyz")[2])
    volume = opened.volumes([2])[0]
    np.testing.assert_array_equal(volume[z : z + 18, y : y + 22, x : x + 22], scan.voxels.T)


def test_the_command_without_an_install_says_how_to_install():
    command = [sys.executable, "-I", "-S", str(ROOT / "data_prep/to_zarr.py"), "a", "b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install -e ." in done.stderr and "Traceback" not in done.stderr


def test_a_mended_source_is_read_again(source, tmp_path):
    """After exit 3 the bad file is replaced; the same call takes it, and keeps what it had."""
    copy, store = tmp_path / "source", tmp_path / "store"
    copy.mkdir()
    for file in source.glob("sub-*.nii.gz"):
        (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(TooManyRefused, match=r"sub-12_T1w\.nii\.gz: "):
        convert(copy, store, PLAN, workers=1, max_refused=0.0)
    (copy / "sub-12_T1w.nii.gz").write_bytes((source / "sub-04_T1w.nii.gz").read_bytes())
    summary = convert(copy, store, PLAN, workers=1, max_refused=0.0)
    assert (summary.taken, summary.refused) == (13, 0)
    assert summary.volumes_now < 13
