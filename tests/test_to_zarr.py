"""The command around conversion: --plan, --verify, --hash-ids, --shard, export-nifti, and what each refuses."""

import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import REAL_DATA, ROOT, refusal, run_brainscale
from hypothesis import given, settings
from hypothesis import strategies as st
from test_preprocess import ORIENTATIONS, head, turned

from brainscale import store as stores
from brainscale.cli import main
from brainscale.geometry import voxel_to_mm
from brainscale.prep_plan import Plan
from brainscale.settings import InputError, load
from brainscale_data_prep import nifti, pseudonyms
from brainscale_data_prep.convert import convert
from brainscale_data_prep.discover import ScanFile
from brainscale_data_prep.estimate import estimate, text
from brainscale_data_prep.export import export_nifti
from brainscale_data_prep.nifti import Scan
from brainscale_data_prep.preprocess import prepare
from brainscale_data_prep.verify import verify

PLAN = Plan(grid_voxels_xyz=(28, 32, 28), spacing_mm_xyz=(2, 2, 2), shard_volumes=2, max_cropped_fraction=1.0)
OPTIONS = [f"{name}={value}" for name, value in (("grid_voxels_xyz", "[28,32,28]"), ("spacing_mm_xyz", "[2,2,2]"),
                                                  ("shard_volumes", 2), ("max_cropped_fraction", 1.0))]  # fmt: skip


def write_bids(root):
    """Five subjects, the last one's file cut short."""
    rng = np.random.default_rng(0)
    for number in range(5):
        folder = root / f"sub-{number:02d}" / "anat"
        folder.mkdir(parents=True)
        affine = np.diag([2, 2, 2 - 0.2 * (number % 2), 1.0])
        nifti.write(folder / f"sub-{number:02d}_T1w.nii.gz", head((26, 30, 27), rng).astype(np.int16), affine)
    file = root / "sub-04/anat/sub-04_T1w.nii.gz"
    file.write_bytes(file.read_bytes()[:-9])
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    (root / "participants.tsv").write_text("participant_id\tage\tsurname\nsub-00\t41\tMiller\nsub-02\t29\tJones\n")
    return root


@pytest.fixture(scope="module")
def bids(tmp_path_factory):
    return write_bids(tmp_path_factory.mktemp("bids"))


@pytest.fixture(scope="module")
def converted(bids, tmp_path_factory):
    store = tmp_path_factory.mktemp("stores") / "store"
    convert(bids, store, PLAN, workers=1)
    return store


# --------------------------------------------------------------------------------------------- export


def test_every_voxel_keeps_its_place_through_conversion_and_export(tmp_path):
    """48 ways to store a scan, each on a random oblique affine: world coordinates of marked voxels to 1e-3 mm."""
    rng, source, marks = np.random.default_rng(0), tmp_path / "source", {}
    source.mkdir()
    for number, (order, signs) in enumerate(ORIENTATIONS):
        voxels = rng.permutation(9 * 10 * 11).reshape(9, 10, 11).astype(np.int16)
        rotation = np.linalg.qr(np.eye(3) + rng.normal(0, 0.15, (3, 3)))[0]
        affine = np.eye(4)
        affine[:3, :3] = rotation * np.sign(np.diag(rotation)) * rng.uniform(5, 7, 3)
        affine[:3, 3] = rng.uniform(-300, 300, 3)
        nifti.write(source / f"{number:02d}.nii", *turned(voxels, affine, order, signs))
        stored = nib.load(source / f"{number:02d}.nii").affine  # as float32 holds it
        turned_voxels, _ = turned(voxels, affine, order, signs)
        marks[f"{number:02d}.nii"] = {
            value: voxel_to_mm(stored, np.argwhere(turned_voxels == value)[0]) for value in rng.integers(1, 990, 8)
        }
    plan = load(Plan, ROOT / "configs/prep/identity.toml", ["foreground=none"])
    convert(source, tmp_path / "store", plan, workers=1)
    store = stores.open_store(tmp_path / "store")
    assert len(store.rows) == 48
    for row, name in zip(store.rows, store.column("source")):
        export_nifti(tmp_path / "store", int(row), tmp_path / f"{row}.nii.gz")
        image = nib.load(tmp_path / f"{row}.nii.gz")
        values = np.asanyarray(image.dataobj)
        single = [value for value in marks[name] if np.count_nonzero(values == value) == 1]  # others equal the padding
        assert len(single) >= 6
        for value, place in ((value, marks[name][value]) for value in single):
            np.testing.assert_allclose(voxel_to_mm(image.affine, np.argwhere(values == value)[0]), place, atol=1e-3)
        if image.header["qform_code"] > 0:
            np.testing.assert_allclose(image.get_qform(), image.affine, atol=1e-3)


@pytest.mark.slow
def test_exported_intensities_are_in_the_original_unit(bids, converted, tmp_path):
    store = stores.open_store(converted)
    run_brainscale("export-nifti", converted, 0, tmp_path / "a.nii.gz")
    image, original = nib.load(tmp_path / "a.nii.gz"), nib.load(bids / store.column("source")[0])
    corner = voxel_to_mm(np.linalg.inv(original.affine) @ image.affine, np.array([14, 16, 14])).round().astype(int)
    assert image.get_fdata()[14, 16, 14] == pytest.approx(original.get_fdata()[tuple(corner)], abs=0.5)
    with pytest.raises(InputError, match=r"row 4 .* holds no volume \(truncated: "):
        export_nifti(converted, 4, tmp_path / "b.nii")
    with pytest.raises(InputError, match="exists"):
        export_nifti(converted, 0, tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=r"\.nii"):
        export_nifti(converted, 0, tmp_path / "a.mgz")
    assert "rows 0 to 3" in refusal(2, "export-nifti", converted, 17, tmp_path / "c.nii")


@given(
    st.sampled_from(ORIENTATIONS),
    st.tuples(*[st.floats(0.5, 6)] * 3),
    st.tuples(*[st.floats(-0.4, 0.4)] * 3),
    st.tuples(*[st.floats(-300, 300)] * 3),
    st.sampled_from(["RAS", "LPS", "LAI"]),
)
@settings(max_examples=60, deadline=None)
def test_world_coordinates_survive_any_affine(tmp_path_factory, orientation, spacing, tilt, origin, stored):
    """Prepared and written as a NIfTI file, every marked voxel lies where it lay, to 1e-3 mm."""
    a, b, c = tilt
    rotation = np.linalg.qr(np.array([[1, -a, b], [a, 1, -c], [-b, c, 1]]))[0]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation * np.sign(np.diag(rotation)) * spacing, origin
    voxels = np.random.default_rng(0).permutation(5 * 6 * 7).reshape(5, 6, 7).astype(np.int16)
    turned_voxels, turned_affine = turned(voxels, affine, *orientation)
    scan = Scan(np.asfortranarray(turned_voxels), 1.0, 0.0, turned_affine, b"", [], "", 0)
    plan = Plan(spacing_mm_xyz="native", crop="centre", foreground="none", orientation=stored)
    prepared = prepare(scan, plan, (8, 8, 8))
    file = tmp_path_factory.mktemp("export") / "a.nii"
    nifti.write(file, prepared.volume_zyx.T, np.array(prepared.record["affine_stored"]).reshape(4, 4))
    image = nib.load(file)
    values = np.asanyarray(image.dataobj)
    found = [value for value in range(210) if np.count_nonzero(values == value) == 1]  # one value fills the padding
    assert len(found) >= 209
    for value in found[::13]:
        place = voxel_to_mm(affine, np.argwhere(voxels == value)[0])
        np.testing.assert_allclose(voxel_to_mm(image.affine, np.argwhere(values == value)[0]), place, atol=1e-3)


# --------------------------------------------------------------------------------------------- verify


def test_verify_agrees_with_its_source_and_names_what_has_changed(bids, converted, tmp_path):
    assert verify(bids, converted, 2) == []
    changed = write_bids(tmp_path / "changed")
    other = nib.load(changed / "sub-01/anat/sub-01_T1w.nii.gz")
    voxels = np.asanyarray(other.dataobj).copy()
    voxels[13, 15, 13] += 200
    nifti.write(changed / "sub-01/anat/sub-01_T1w.nii.gz", voxels, other.affine)
    (changed / "sub-02/anat/sub-02_T1w.nii.gz").unlink()
    mended = (changed / "sub-00/anat/sub-00_T1w.nii.gz").read_bytes()
    (changed / "sub-04/anat/sub-04_T1w.nii.gz").write_bytes(mended)
    text = "\n".join(verify(changed, converted, 1))
    assert "1 scans are in the store but not in the source: sub-02/anat/sub-02_T1w.nii.gz" in text
    assert "row 1, sub-01/anat/sub-01_T1w.nii.gz: its file is not the one that was converted" in text
    assert "row 4, sub-04/anat/sub-04_T1w.nii.gz: was refused (truncated), would now be taken" in text
    assert "row 0" not in text and "row 3" not in text


def test_verify_compares_names_too(bids, tmp_path):
    (tmp_path / "a.nii.gz").write_bytes((bids / "sub-00/anat/sub-00_T1w.nii.gz").read_bytes())
    table = tmp_path / "t.csv"
    table.write_text("path,subject,contrast\na.nii.gz,one,T1w\n")
    convert(table, tmp_path / "store", PLAN, workers=1)
    table.write_text("path,subject,contrast\na.nii.gz,two,T1w\n")
    assert verify(table, tmp_path / "store", 1) == ["row 0, a.nii.gz: subject is 'one', now 'two'"]


def test_verify_finds_voxels_and_numbers_that_the_source_does_not_give(bids, tmp_path):
    """A converter that had put another volume or affine into a row: the store is whole, but not true."""
    convert(bids, tmp_path / "store", PLAN, workers=1)
    wrong = tmp_path / "wrong"
    stores.create(wrong, PLAN, (28, 32, 28), 5)
    good = stores.open_store(tmp_path / "store")
    table = pq.read_table(tmp_path / "store" / "scans.parquet").to_pylist()
    for shard, rows in ((0, (0, 1)), (1, (2, 3)), (2, (4,))):
        records, volumes = [], np.zeros((len(rows), 28, 32, 28), np.int16)
        cells = np.zeros((len(rows), 7, 8, 7), np.uint8)
        for slot, row in enumerate(rows):
            if row == 4:
                records.append({k: good.refused[0][k] for k in ("row", "id", "status", "reason", "sentence", "source")})
                continue
            record = {k: v for k, v in table[row].items() if not k.startswith("participant_")} | {"participant": {}}
            volumes[slot], cells[slot] = good.volumes([row])[0], good.foreground([row])[0]
            cells[slot, 3, 4, 3] ^= 64 if row == 3 else 0
            if row == 1:
                volumes[slot, 14, 16, 14] += 2
            if row == 2:
                record["affine_stored"] = (np.array(record["affine_stored"]) + 0.01).tolist()
            records.append(record)
        stores.write_shard(wrong, shard, volumes, cells, records)
    stores.finish(wrong)
    problems = verify(bids, wrong, 1)
    assert len(problems) == 3 and "row 3" in problems[2] and "1 cells of its foreground differ" in problems[2]
    assert "row 1" in problems[0] and "1 voxels differ" in problems[0]
    assert "row 2" in problems[1] and "affine_stored differs" in problems[1]


def test_a_file_that_a_table_names_twice_is_verified_row_by_row(bids, tmp_path):
    name = "sub-00/anat/sub-00_T1w.nii.gz"
    (bids / "twice.csv").write_text(f"path,id\n{name},a\n{name},b\n")
    convert(bids / "twice.csv", tmp_path / "store", PLAN, workers=1)
    assert verify(bids / "twice.csv", tmp_path / "store", 1) == []
    (bids / "twice.csv").unlink()


# --------------------------------------------------------------------------------------------- plan


def test_a_plan_foretells_what_the_conversion_then_takes(bids, converted, tmp_path):
    foretold = estimate(bids, tmp_path / "store", PLAN, workers=2)
    assert not (tmp_path / "store").exists()
    assert (foretold.scans, foretold.sampled, foretold.shards) == (5, 5, 3)
    assert [line.split(": ")[:2] for line in foretold.refused] == [["sub-04/anat/sub-04_T1w.nii.gz", "truncated"]]
    arrays = [p for name in ("volumes", "foreground") for p in (converted / name).rglob("*")]
    found = sum(path.stat().st_size for path in arrays if path.is_file())
    assert foretold.store_bytes == pytest.approx(found, rel=0.25)
    inodes = len(list(converted.rglob("*")))
    assert inodes <= foretold.inodes <= inodes + 20
    assert 30e6 < foretold.worker_bytes < 1e9 and foretold.seconds > 0
    words = text(foretold)
    for part in (
        "volumes    5 of 28 × 32 × 28",
        "GB free",
        "inodes",
        "s) with 2 workers",
        "per worker",
        "1 truncated",
    ):
        assert part in words, words


def test_a_plan_of_scans_that_are_all_refused_says_so(bids, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.nii.gz").write_bytes((bids / "sub-04/anat/sub-04_T1w.nii.gz").read_bytes())
    words = text(estimate(tmp_path / "source", tmp_path / "store", PLAN, workers=1))
    assert "not known" in words and "1 truncated" in words


# --------------------------------------------------------------------------------------------- names


@pytest.mark.slow
def test_hashed_names_appear_nowhere_in_the_store(bids, tmp_path):
    store, key = tmp_path / "store", tmp_path / "store.key"
    arguments = [bids, store, *OPTIONS, "--workers", 1, "--hash-ids"]
    first = run_brainscale("to-zarr", *arguments)
    assert str(key) in first.stdout and key.stat().st_mode & 0o777 == 0o600
    held = b"".join(p.read_bytes() for p in store.rglob("*") if p.is_file())
    held += b"".join(str(p.relative_to(store)).encode() for p in store.rglob("*"))
    table = pq.read_table(store / "scans.parquet").to_pylist()
    held += json.dumps(table).encode() + (tmp_path / "store.qc.html").read_bytes()
    for name in ("sub-00", "sub-02", "sub-04", "/anat/", "T1w.nii", "Miller", "Jones", str(bids)):
        found = re.search(re.escape(name.encode()) + rb"(?![0-9a-f])", held)  # a pseudonym may begin as a name does
        assert not found, name
    opened = stores.open_store(store)
    secret = pseudonyms.read_key(key)
    assert opened.column("subject")[2] == f"sub-{pseudonyms.pseudonym(secret, 'subject', 'sub-02')}"
    assert opened.column("participant_age")[2] == "29" and len(set(opened.column("id"))) == 4
    assert "already done" in run_brainscale("to-zarr", *arguments).stdout
    assert "agrees" in run_brainscale("to-zarr", bids, store, "--workers", 1, "--hash-ids", "--verify").stdout
    key.unlink()
    assert "made from other scans" in refusal(2, "to-zarr", *arguments)


def test_a_key_makes_the_same_names_again_and_another_key_others(tmp_path):
    scans = [ScanFile("a", tmp_path / "a.nii", "x/a.nii", "sub-1", "ses-1", "T1w"),
             ScanFile("b", tmp_path / "b.nii", "x/b.nii", code="duplicate", sentence="given to x/a.nii")]  # fmt: skip
    one, two = (pseudonyms.read_key(tmp_path / name) for name in ("one", "two"))
    assert pseudonyms.read_key(tmp_path / "one") == one != two
    hidden = pseudonyms.hide(scans, one)
    assert hidden == pseudonyms.hide(scans, one) and hidden[0].id != pseudonyms.hide(scans, two)[0].id
    assert "a.nii" not in hidden[1].sentence and hidden[1].code == "duplicate" and hidden[0].path == scans[0].path
    names = [value for scan in hidden for value in (scan.id, scan.source, scan.subject, scan.session) if value]
    assert len(set(names)) == len(names) and not any("x/" in name or "sub-1" == name for name in names)
    (tmp_path / "one").write_text("nothing")
    with pytest.raises(InputError, match="holds no key"):
        pseudonyms.read_key(tmp_path / "one")


# --------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--shard", "2/2"], "--shard '2/2' is not i/n"),
        (["--shard", "half"], "--shard 'half' is not i/n"),
        (["--max-refused", "5 percent"], "is no share"),
        (["--max-refused", "500%"], "is no share"),
        (["--entity", "MNI"], "is not NAME=VALUE"),
        (["--plan", "--verify"], "exclude each other"),
        (["--assume-orientation", "XYZ"], "assume_orientation"),
        (["--verify"], "no COMPLETE.json"),
        (["--workers", "0"], "got 0 workers"),
    ],
)
def test_options_that_mean_nothing_are_refused(bids, tmp_path, options, sentence):
    if options == ["--verify"]:
        stores.create(tmp_path / "store", PLAN, (28, 32, 28), 5)
    code, words = refused_by(main, ["to-zarr", str(bids), str(tmp_path / "store"), *options])
    assert code == 2 and sentence in words


def refused_by(main, arguments):
    """Exit code and text of a command run in this process."""
    output = io.StringIO()
    with pytest.raises(SystemExit) as left, contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        main(arguments)
    return left.value.code, output.getvalue()


@pytest.mark.slow
def test_tasks_of_an_array_build_one_store_with_its_page(bids, converted, tmp_path):
    """slurm/to_zarr.sh run as an array of three would, the tasks at once."""
    store = tmp_path / "store"
    environment = {**os.environ, "PYTHON": sys.executable, "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    running = [
        subprocess.Popen(
            ["bash", "slurm/to_zarr.sh", bids, store, *OPTIONS],
            cwd=ROOT,
            env={**environment, "SLURM_ARRAY_TASK_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2, 3)
    ]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert sum("look at it" in output for output, _ in outputs) >= 1
    assert (tmp_path / "store.qc.html").exists()
    for path, other in itertools.product((store,), (converted,)):
        assert (path / "COMPLETE.json").read_bytes() == (other / "COMPLETE.json").read_bytes()


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="real data absent: set BRAINSCALE_TEST_DATA")
def test_real_scans_verify_against_their_source(tmp_path):
    plan = load(Plan, ROOT / "configs/prep/brain_1mm.toml")
    summary = convert(REAL_DATA / "ds002748_native", tmp_path / "store", plan, workers=2)
    assert summary.taken == 2 and verify(REAL_DATA / "ds002748_native", tmp_path / "store", 2) == []
