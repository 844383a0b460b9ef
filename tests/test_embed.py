"""`brainscale embed`: a store, or the NIfTI files that it was made of, in; the same features out."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run_brainscale
from safetensors.torch import save_file
from test_features import encoder_for

from brainscale import cli, features
from brainscale.encoder_files import ExportConfig, WeightsFile
from brainscale.features import embed, embed_files, feature_names
from brainscale.nifti_rows import find, plan_grid_xyz, prepared
from brainscale.prep_plan import Plan
from brainscale.pretrained import Pretrained
from brainscale.settings import InputError, load
from brainscale.stores import open_stores
from brainscale.volume_embedder import VolumeEmbedder
from brainscale_data_prep.convert import convert

GRID_XYZ = (24, 32, 24)
PLAN = Plan(grid_voxels_xyz=GRID_XYZ, spacing_mm_xyz=(4.0, 4.0, 4.0))
BASE = np.diag([4.0, 4.0, 4.0, 1.0])


def head(seed: int, spacing_mm: float = 4.0) -> np.ndarray:
    """(x,y,z) int16: a smooth head of the same size in mm on a dark background, of any spacing."""
    rng = np.random.default_rng(seed)
    shape = [round(96 / spacing_mm), round(112 / spacing_mm), round(96 / spacing_mm)]
    x, y, z = np.meshgrid(*((np.arange(n) + 0.5) / n * 2 - 1 for n in shape), indexing="ij")
    phases = rng.uniform(0, 6, 3)
    inside = (x - 0.1) ** 2 + y**2 + z**2 < 0.7
    return np.where(inside, 600 + 200 * np.cos(3 * x + phases[0]) * np.cos(4 * y + phases[1]) + 90 * z, 0).astype(
        np.int16
    )


def write(path: Path, voxels: np.ndarray, affine: np.ndarray = BASE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(voxels, affine).to_filename(path)
    return path


def flipped(voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same brain stored as LPS."""
    affine = BASE @ np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[:2, 3] = [4.0 * (voxels.shape[0] - 1), 4.0 * (voxels.shape[1] - 1)]
    return np.ascontiguousarray(voxels[::-1, ::-1]), affine


@pytest.fixture(scope="module")
def bids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four subjects; beside them a file of zeros and one that is cut short."""
    root = tmp_path_factory.mktemp("bids") / "data"
    for number in range(4):
        write(root / f"sub-{number}/anat/sub-{number}_T1w.nii.gz", head(number))
    write(root / "sub-4/anat/sub-4_T1w.nii.gz", np.zeros((24, 28, 24), np.int16))
    whole = (root / "sub-0/anat/sub-0_T1w.nii.gz").read_bytes()
    (root / "sub-5/anat").mkdir(parents=True)
    (root / "sub-5/anat/sub-5_T1w.nii.gz").write_bytes(whole[: len(whole) // 2])
    (root / "dataset_description.json").write_text('{"Name": "a", "BIDSVersion": "1.8.0"}')
    people = "".join(f"sub-{n}\t{'fm'[n % 2]}\t{50 + n}\n" for n in range(6))
    (root / "participants.tsv").write_text("participant_id\tsex\tage\n" + people)
    return root


@pytest.fixture(scope="module")
def brains(bids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store made of them."""
    path = tmp_path_factory.mktemp("stores") / "brains"
    convert(bids, path, PLAN, workers=1)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export directory of an encoder with random weights."""
    return write_export(tmp_path_factory.mktemp("exports") / "a", encoder_for(PLAN, GRID_XYZ[::-1]))


def write_export(folder: Path, pretrained: Pretrained) -> Path:
    folder.mkdir()
    weights = folder / "model.safetensors"
    save_file(pretrained.state_dict(), weights, metadata={"format": "pt"})
    record = WeightsFile(num_bytes=weights.stat().st_size, sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    config = ExportConfig(
        model=pretrained.settings, contract=pretrained.contract, about=pretrained.about, weights=record
    )
    (folder / "config.json").write_text(config.model_dump_json())
    return folder


def brainscale(*arguments: str | Path) -> int:
    """Exit code of a command line, in this process."""
    try:
        cli.main([*map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def matrix(made: pa.Table) -> np.ndarray:
    return np.stack(made["features"].to_numpy())


# ------------------------------------------------------------------------------------------------ the same features


def test_a_store_and_its_files_give_the_same_bits(bids, brains, exported, tmp_path, capsys):
    recipe = ("--layers", "-1,1", "--pooling", "mean+std", "--foreground-only")
    one, two = tmp_path / "store.parquet", tmp_path / "new" / "files.parquet"
    assert brainscale("embed", exported, brains, "--out", one, *recipe) == 0
    assert "scans refused when the store was made: 2," in capsys.readouterr().err
    assert brainscale("embed", exported, bids, "--out", two, *recipe) == 0
    stored, made = pq.read_table(one), pq.read_table(two)
    assert stored.num_rows == 4 and matrix(stored).shape == (4, len(feature_names(24, (-1, 1), "mean+std")))
    assert made.equals(stored, check_metadata=True), "ids, participants, features and how they were made"
    assert made["participant_sex"].to_pylist() == ["f", "m", "f", "m"] and made["row"].to_pylist() == [0, 1, 2, 3]
    assert np.abs(matrix(made)[0] - matrix(made)[1]).max() > 1e-3


def test_refused_files_are_listed(bids, exported, tmp_path, capsys):
    out = tmp_path / "f.parquet"
    assert brainscale("embed", exported, bids, "--out", out, "--max-refused", "40%") == 0
    said = capsys.readouterr()
    assert said.out == f"{out}: 4 volumes × 24 features\n"
    listed = [json.loads(line) for line in (tmp_path / "f.parquet.refused.jsonl").read_text().splitlines()]
    assert [(line["row"], line["id"].rpartition("/")[2], line["reason"]) for line in listed] == [
        (4, "sub-4_T1w", "constant"), (5, "sub-5_T1w", "truncated"),
    ]  # fmt: skip
    assert all(set(line) == {"row", "id", "status", "source", "reason", "sentence"} for line in listed)
    assert "refused sub-4/anat/sub-4_T1w.nii.gz: constant: " in said.err

    assert (
        brainscale("embed", exported, bids, "--where", "participant_sex=f", "--where", "id=sub-0_T1w", "--out", out)
        == 0
    )
    assert not (tmp_path / "f.parquet.refused.jsonl").exists(), "a list of another time is not left behind"
    assert pq.read_table(out)["id"].to_pylist() == ["sub-0_T1w"]


def test_too_many_refused_end_with_3_and_no_table(bids, exported, tmp_path, capsys):
    out = tmp_path / "f.parquet"
    assert brainscale("embed", exported, bids, "--out", out, "--max-refused", "20%") == 3
    assert "2 of 6 scans are refused" in capsys.readouterr().err and not out.exists()
    assert brainscale("embed", exported, bids / "sub-4/anat/sub-4_T1w.nii.gz", "--out", out) == 3
    assert not out.exists() and len((tmp_path / "f.parquet.refused.jsonl").read_text().splitlines()) == 1


def test_the_same_brain_otherwise_stored_gives_the_same_features(exported, tmp_path):
    voxels = head(3)
    ras = write(tmp_path / "ras.nii.gz", voxels)
    lps = write(tmp_path / "lps.nii.gz", *flipped(voxels))
    scaled = write(tmp_path / "float.nii", voxels.astype(np.float32))
    other = write(tmp_path / "other.nii.gz", head(4))
    embedder = VolumeEmbedder(exported).fit()
    one, two, real, another = embedder.transform([ras, lps, scaled, other])
    np.testing.assert_array_equal(two, one)
    assert np.abs(real - one).max() < 0.01 * np.abs(another - one).max(), "rounded to quanta"
    twice = np.array([[ras], [ras]], dtype=object)
    np.testing.assert_array_equal(embedder.transform(twice), [one, one])


def test_another_spacing_is_brought_to_the_plans(tmp_path):
    finer = np.diag([2.0, 2.0, 2.0, 1.0])
    paths = [write(tmp_path / "a.nii.gz", head(3)), write(tmp_path / "b.nii.gz", head(3, 2.0), finer)]
    one, two = (scan for _, scan in prepared(find(paths)[0], PLAN, GRID_XYZ, 1))
    assert np.corrcoef(one.volume_zyx.ravel(), two.volume_zyx.ravel())[0, 1] > 0.95
    assert two.record["affine_stored"][0] == 4.0 and two.record["spacing_source_mm_xyz"] == [2.0] * 3


@pytest.mark.slow
def test_bytes_do_not_depend_on_time_place_or_workers(bids, exported, tmp_path):
    files = sorted(bids.glob("sub-[0-3]/anat/*.nii.gz"))
    made = []
    for name, workers in (("a", 1), ("b", 2)):
        assert brainscale("embed", exported, *files, "--out", tmp_path / f"{name}.parquet", "--workers", workers) == 0
        made.append((tmp_path / f"{name}.parquet").read_bytes())
    assert made[0] == made[1]
    assert brainscale("embed", exported, *files, "--out", tmp_path / "a.parquet", "--batch", 3) == 0
    assert np.allclose(
        matrix(pq.read_table(tmp_path / "a.parquet")), matrix(pq.read_table(tmp_path / "b.parquet")), atol=1e-6
    )
    assert not list(tmp_path.glob("*.partial"))


def test_files_given_alone_are_named_by_their_paths(bids, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(bids)
    files = ["sub-1/anat/sub-1_T1w.nii.gz", "sub-0/anat/sub-0_T1w.nii.gz"]
    assert brainscale("embed", exported, *files, "--out", tmp_path / "f.parquet") == 0
    made = pq.read_table(tmp_path / "f.parquet")
    assert made["id"].to_pylist() == [file.removesuffix(".nii.gz") for file in files]
    assert made["subject"].to_pylist() == ["sub-1", "sub-0"] and made["contrast"].to_pylist() == ["T1w", "T1w"]
    with pytest.raises(InputError, match="given twice"):
        find([Path(files[0]), Path(files[0])])
    both = find([bids / "sub-0", bids / "sub-1"])[0]
    assert [scan.id.partition("/")[0] for scan in both] == ["1", "2"]
    shutil.copy(files[0], tmp_path / "sub-1_dseg.nii.gz")
    assert find([tmp_path / "sub-1_dseg.nii.gz"])[0][0].code == "not_a_brain_scan"


# ------------------------------------------------------------------------------------------------ the contract


def test_a_store_of_another_plan_is_refused(brains, tmp_path, capsys):
    other = PLAN.model_copy(update={"spacing_mm_xyz": (3.0, 3.0, 3.0)})
    folder = write_export(tmp_path / "a", encoder_for(other, GRID_XYZ[::-1]))
    out = tmp_path / "f.parquet"
    assert brainscale("embed", folder, brains, "--out", out) == 2
    assert "spacing_mm_xyz" in capsys.readouterr().err and not out.exists()


def test_plans_of_the_largest_scan_use_the_volumes_that_the_encoder_saw(bids, tmp_path, capsys):
    identity = load(Plan, ROOT / "configs/prep/identity.toml")
    assert plan_grid_xyz(identity, (16, 32, 24)) == (24, 32, 16) and plan_grid_xyz(PLAN, (8, 8, 8)) == GRID_XYZ
    folder = write_export(tmp_path / "a", encoder_for(identity, (24, 32, 24)))
    out = tmp_path / "f.parquet"
    assert brainscale("embed", folder, bids / "sub-0/anat/sub-0_T1w.nii.gz", "--out", out) == 0
    assert "keeps every scan's own spacing" in capsys.readouterr().err
    large = write(tmp_path / "large.nii.gz", head(0, 2.0), np.diag([2.0, 2.0, 2.0, 1.0]))
    assert brainscale("embed", folder, large, "--out", out) == 3
    assert "does_not_fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{store}", "--out", "f.csv"), "give FILE.parquet"),
        (("--out", "{out}"), "no volumes given"),
        (("{store}", "{bids}", "--out", "{out}"), "two commands"),
        (("{store}", "--out", "{out}", "--layers", "a"), "no list of numbers"),
        (("{store}", "--out", "{out}", "--layers", "5"), "got layer 5"),
        (("{store}", "--out", "{out}", "--pooling", "sum"), "mean, max"),
        (("{store}", "--out", "{out}", "--where", "contrast"), "COLUMN=VALUE"),
        (("{store}", "--out", "{out}", "--where", "contrast=T2w"), "contrast is one of T1w"),
        (("{store}", "--out", "{out}", "--where", "height=2"), "no column 'height'"),
        (("{store}", "--out", "{out}", "--part", "teacher"), "an export of a run's encoder"),
        (("{bids}/nothing.nii.gz", "--out", "{out}"), "does not exist"),
        (("{bids}", "--out", "{out}", "--max-refused", "9"), "no share"),
    ],
)
def test_mistakes_are_one_sentence(bids, brains, exported, tmp_path, capsys, arguments, said):
    names = {"store": brains, "bids": bids, "out": tmp_path / "f.parquet"}
    assert brainscale("embed", exported, *(text.format(**names) for text in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not (tmp_path / "f.parquet").exists()


def test_the_transformer_leaves_no_scan_out(bids, exported):
    with pytest.raises(InputError, match=r"sub-4_T1w.nii.gz cannot be taken \(constant"):
        VolumeEmbedder(exported).fit().transform([*map(str, sorted(bids.glob("sub-[34]/anat/*")))])
    with pytest.raises(InputError, match="no path of a NIfTI file"):
        VolumeEmbedder(exported).fit().transform([0, 1])


# ------------------------------------------------------------------------------------------------ real runs and data


@pytest.mark.slow
def test_features_need_no_deepspeed_and_no_triton():
    code = "import sys; sys.modules |= dict.fromkeys(('deepspeed', 'triton')); import brainscale.volume_embedder"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_run_embeds_its_store(unbroken, tiny_store, tmp_path):
    out = tmp_path / "f.parquet"
    done = run_brainscale("embed", unbroken, tiny_store, "--out", out, "--device", "cpu")
    assert "10 volumes × 24 features" in done.stdout
    said = pq.read_schema(out).metadata
    assert said[b"step"] == b"40" and said[b"objective"] == b"mae" and said[b"encoder"] == b"unbroken"


def test_real_scans_in_every_orientation_give_the_same_features(real_data):
    plan = load(Plan, ROOT / "configs/prep/brain_2mm.toml")
    pretrained = encoder_for(plan, (80, 96, 80))
    names = [real_data / "orientations" / f"{name}.nii.gz" for name in ("RAS", "LPS", "PIR")]
    found = embed_files(pretrained, find(names)[0], (80, 96, 80))
    assert not found.refused and np.isfinite(found.features).all()
    assert np.abs(found.features - found.features[0]).max() < 1e-4 * np.abs(found.features).max()


@pytest.mark.slow
def test_real_scans_and_their_store_give_the_same_bits(real_data, tmp_path):
    for subject in ("sub-01", "sub-04", "sub-06", "sub-07"):
        shutil.copytree(real_data / "ds002748_2mm" / subject, tmp_path / "data" / subject)
    shutil.copy(real_data / "ds002748_2mm/dataset_description.json", tmp_path / "data")
    plan = load(Plan, ROOT / "configs/prep/brain_2mm.toml")
    convert(tmp_path / "data", tmp_path / "store", plan, workers=2)
    store, pretrained = open_stores([tmp_path / "store"]), encoder_for(plan, (80, 96, 80))
    recipe = {"layers": (0, -1), "pooling": "mean+std", "foreground_only": True}
    stored = embed(pretrained, store, store.rows, **recipe)
    found = embed_files(pretrained, find([tmp_path / "data"])[0], (80, 96, 80), workers=2, **recipe)
    np.testing.assert_array_equal(found.features, stored)
    scans = features.file_scans(found)
    assert scans["id"].to_pylist() == store.column("id").tolist() and len(scans) == 4
