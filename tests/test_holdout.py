"""Held-out subjects: nobody on both sides, another subject is another, foreground is where the values are."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG, write_tiny_store

from brainscale import run_folder, store
from brainscale.config import Config
from brainscale.geometry import patchify
from brainscale.holdout import Holdout, radial_power
from brainscale.layers import initialise
from brainscale.mae import Mae
from brainscale.reader import Reader
from brainscale.settings import load

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path) -> Config:
    (tmp_path / "tiny.toml").write_text(TINY_CONFIG)
    return load(Config, tmp_path / "tiny.toml", ("log.holdout_volumes=4",))


def make(path, config) -> tuple[Holdout, Mae]:
    reader = Reader(store.open_store(path), config.model.patch_voxels_zyx, None)
    train_rows, held_rows = run_folder.split_rows(reader.store, config)
    model = Mae(config, reader.volume_zyx)
    initialise(model, torch.Generator().manual_seed(0))
    return Holdout(reader, held_rows, train_rows, config), model


def test_one_scan_per_subject_comes_first_and_partners_differ(tiny_store, config):
    holdout, _ = make(tiny_store, config)
    assert len(set(holdout.subjects[:2])) == 2 and len(set(holdout.subjects)) == 2
    for number in range(4):
        partner = holdout.other_subject(number)
        assert partner is not None and holdout.subjects[partner] != holdout.subjects[number]


def test_one_held_out_subject_has_no_partner(tiny_store, config):
    alone = config.model_copy(update={"data": config.data.model_copy(update={"holdout_fraction": 0.2})})
    holdout, _ = make(tiny_store, alone)
    assert len(holdout.rows) == 2 and holdout.other_subject(0) is None


def test_equal_voxels_under_another_id_stay_on_one_side(tmp_path, config):
    def change(record):
        record["subject"] = f"sub-{record['row']:02d}"
        record["voxels_xxh3_128"] = f"{record['row'] // 5:032x}"

    subjects = run_folder.subjects_of(store.open_store(write_tiny_store(tmp_path / "twins", change=change)))
    assert len(set(subjects[:5])) == 1 and len(set(subjects[5:])) == 1 and subjects[0] != subjects[5]


@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_errors_count_foreground_by_value(scale, tmp_path, config):
    """Codes that fall as values rise (negative scale) select the same voxels; errors equal plain arithmetic."""

    def change(record):
        record.update(scale=scale, offset=3.0 * scale)
        for name in ("mean", "clip_low", "clip_high", "foreground_threshold"):
            record[name] = record[name] * scale + 3.0 * scale
        record["std"] *= abs(scale)
        if scale < 0:
            record["clip_low"], record["clip_high"] = record["clip_high"], record["clip_low"]
            record["foreground_threshold"] = -1e9

    path = write_tiny_store(tmp_path / "scaled", change=change)
    holdout, model = make(path, config)
    means = holdout.reconstruction_errors(model, CPU, 7, tmp_path / "reconstruction.json")
    case = holdout.case(0, CPU)
    row = int(case.batch.row[0])
    values = holdout.reader.store.volumes([row])[0].astype(float) * scale + 3.0 * scale
    at = holdout.reader.at(row)
    inside = values > holdout.reader.store.column("foreground_threshold")[at]
    ids = case.masks.masked[0]
    assert torch.equal(
        holdout._foreground(model, case)[0], patchify(torch.from_numpy(inside)[None, None], (8, 8, 8))[0][ids]
    )
    record = json.loads((tmp_path / "reconstruction.json").read_text())
    assert record["step"] == 7 and record["errors"] == means
    first = next(line for line in record["cases"] if line["row"] == row and line["mask"] == 0)
    target = model.gather(case.batch, case.masks.masked, torch.float32)
    own = model.predict(model.gather(case.batch, case.masks.visible), case.masks).detach()
    mask = holdout._foreground(model, case)
    assert first["own"] == pytest.approx(float(((own - target) ** 2)[mask].mean()), rel=1e-5)
    if scale > 0:
        assert 0.2 < inside.mean() < 0.8


def test_radial_power_is_flat_for_white_noise_and_sharp_for_a_wave():
    noise = np.random.default_rng(0).normal(size=(32, 40, 36))
    assert np.abs(radial_power(noise)[4:] - 1).max() < 0.35
    wave = np.sin(2 * np.pi * 8 / 32 * np.arange(32))[:, None, None] * np.ones((32, 32, 32))
    power = radial_power(wave)
    assert power.argmax() == int(8 / 32 / 0.5 * 40) and power.max() > 100 * np.sort(power)[-2]
