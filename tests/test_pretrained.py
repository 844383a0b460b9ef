"""An encoder out of a run: the same features as in training, with the contract of how volumes were prepared."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_CONFIG
from processes import run_ranks
from torch import Tensor

from brainscale import checkpoint_files as files
from brainscale.config import Config
from brainscale.layers import initialise
from brainscale.loader import Batch
from brainscale.objective import OBJECTIVES, Objective
from brainscale.ops import Stored
from brainscale.prep_plan import Plan
from brainscale.pretrained import from_run, open_pretrained, random_like
from brainscale.reader import normalisation
from brainscale.settings import InputError, load
from brainscale.stores import Stores

JEPA = ('objective="jepa"', "jepa.predictor_width=12", "jepa.predictor_depth=1", "jepa.predictor_heads=1")


@pytest.fixture(scope="module")
def jepa(tiny_store, tiny_config, tmp_path_factory) -> Path:
    """A JEPA of six steps with fixed positions, three blocks and crops, on the tiny store."""
    run = tmp_path_factory.mktemp("pretrained") / "jepa"
    more = ("train.num_steps=6", "jepa.momentum=0.9", 'model.position="sincos"', "model.depth=3")
    crop = "data.crop_voxels_zyx=[16,16,16]"
    run_ranks(
        "pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", *JEPA, *more, crop, logs=run.parent
    )
    return run


def batch_of(store: Stores, size_zyx: tuple[int, int, int]) -> Batch:
    """The corners of all volumes of a store, as the training loop holds them."""
    z, y, x = size_zyx
    parameters = [torch.from_numpy(values) for values in normalisation(store)]
    stored = Stored(torch.from_numpy(store.volumes(store.rows))[:, None, :z, :y, :x], *parameters)
    return Batch(*stored, torch.ones(len(store.rows), z * y * x // 512), store.rows, store.rows)


def values(batch: Batch) -> Tensor:
    """(B,Z,Y,X) float32 as the encoder reads them."""
    scale, offset, low, high = (v[:, None, None, None] for v in batch.stored[1:])
    return (batch.volumes[:, 0].float() * scale + offset).clamp(low, high)


def training_model(run: Path, size_zyx: tuple[int, int, int]) -> Objective:
    """The model of a run as the loop makes it, with the weights of its last checkpoint."""
    path = files.directories(run / "checkpoints")[-1]
    config = Config.model_validate(files.read_state(path).config)
    model = OBJECTIVES[config.objective](config, size_zyx)
    model.load_state_dict(files.read_weights(path))
    return model


def copy(run: Path, folder: Path) -> Path:
    """A run folder to spoil."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("tensorboard", "*.html"))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", ["unbroken", "jepa"])
def test_features_of_a_run_are_those_of_the_training_model(name, tiny_store, request):
    run, store = request.getfixturevalue(name), Stores([tiny_store])
    pretrained = from_run(run)
    size = (16, 24, 16) if name == "unbroken" else (16, 16, 16)
    assert pretrained.contract.volume_zyx == size and pretrained.contract.plan == store.plan
    batch, model = batch_of(store, size), training_model(run, size)
    ids = torch.arange(batch.foreground.shape[1]).expand(len(store.rows), -1)
    wanted = model.embed(batch, ids)
    torch.testing.assert_close(pretrained.tokens(values(batch))[0], wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(pretrained(values(batch)), wanted.mean(1), atol=1e-5, rtol=0)
    assert wanted.std() > 0.1
    about = pretrained.about
    assert (about["step"], about["samples"]) == ((40, 160) if name == "unbroken" else (6, 24))
    assert about["flops"] == about["samples"] * model.flops()
    assert about["parameters"] == sum(p.numel() for p in pretrained.parameters())


@torch.no_grad()
def test_the_teacher_is_another_part(jepa, unbroken, tiny_store):
    batch, model = batch_of(Stores([tiny_store]), (16, 16, 16)), training_model(jepa, (16, 16, 16))
    teacher = from_run(jepa, "teacher")
    ids = torch.arange(8).expand(10, -1)
    wanted = model.teacher(model.gather(batch, ids), ids)
    torch.testing.assert_close(teacher.tokens(values(batch))[0], wanted, atol=1e-5, rtol=0)
    assert (teacher(values(batch)) - from_run(jepa)(values(batch))).abs().max() > 1e-3
    assert teacher.about["part"] == "teacher"
    with pytest.raises(InputError, match="a mae run has no part 'teacher'; give 'encoder'"):
        from_run(unbroken, "teacher")


@torch.no_grad()
def test_layers(jepa):
    pretrained = from_run(jepa)
    volumes = torch.randn((2, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    last, first, third = pretrained.tokens(volumes, (-1, 0, 2))
    torch.testing.assert_close(pretrained.encoder.trunk.norm(third), last, atol=1e-6, rtol=0)
    assert (third - first).abs().max() > 1e-3 and torch.equal(pretrained.tokens(volumes, [0])[0], first)
    assert not any(block._forward_hooks for block in pretrained.encoder.trunk.blocks)
    with pytest.raises(InputError, match="got layer 3, and the encoder has blocks 0 to 2"):
        pretrained.tokens(volumes, (3,))
    with pytest.raises(InputError, match=r"got volumes of \(16, 16, 8\) voxels"):
        pretrained(volumes[..., :8])


@torch.no_grad()
@pytest.mark.parametrize("name", ["unbroken", "jepa"])
def test_another_size_keeps_weights_and_positions(name, request):
    """The first block of a larger volume, seen alone, has the tokens that the smaller volume has."""
    pretrained = from_run(request.getfixturevalue(name))
    size = pretrained.contract.volume_zyx
    larger = pretrained.at((32, size[1], 24))
    assert larger.contract.volume_zyx == (32, size[1], 24) and larger.contract.plan == pretrained.contract.plan
    here, there = (p.encoder.trunk.coordinates.tolist() for p in (pretrained, larger))
    same = torch.tensor([there.index(place) for place in here])[None]
    patches = torch.randn((1, len(here), 512), generator=torch.Generator().manual_seed(0))
    wanted = pretrained.encoder(patches, torch.arange(len(here))[None])
    torch.testing.assert_close(larger.encoder(patches, same), wanted, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="no multiple of the patch"):
        pretrained.at((32, 20, 16))


def test_a_random_encoder_is_what_the_run_began_with(unbroken):
    trained, other = from_run(unbroken), random_like(from_run(unbroken), 0)
    began = OBJECTIVES["mae"](Config.model_validate(trained.about["settings"]), (16, 24, 16))
    initialise(began, torch.Generator().manual_seed(0))
    assert all(p.equal(began.encoder.state_dict()[name]) for name, p in other.encoder.state_dict().items())
    weight = "embed.weight"
    assert not random_like(trained, 1).encoder.state_dict()[weight].equal(other.encoder.state_dict()[weight])
    assert (other.about["objective"], other.about["step"], other.about["flops"]) == ("random", 0, 0)
    assert trained.about["objective"] == "mae" and other.contract == trained.contract


@pytest.mark.parametrize(
    "change",
    [
        {"spacing_mm_xyz": (2.0, 2.0, 2.0)}, {"orientation": "LPS"}, {"normalize": "unit_range"},
        {"clip_percentiles": (1.0, 99.0)}, {"dtype": "uint8"}, {"foreground": "otsu"}, {"crop": "centre"},
        {"grid_voxels_xyz": (16, 16, 16)},
    ],
)  # fmt: skip
def test_volumes_prepared_otherwise_are_refused(change, unbroken):
    pretrained = from_run(unbroken)
    (key, now), *_ = Plan(**change).model_dump(mode="json", include=set(change)).items()
    with pytest.raises(InputError) as error:
        pretrained.check(pretrained.contract.plan.model_copy(update=change), "stores/b")
    before = pretrained.contract.plan.model_dump(mode="json")[key]
    assert str(error.value).startswith("stores/b was prepared otherwise")
    assert f"({key} = {now!r} in place of {before!r})" in str(error.value)


def test_what_changes_no_value_is_no_difference(unbroken):
    pretrained = from_run(unbroken)
    same = {
        "codec": "zstd", "chunk_voxels_zyx": "volume", "shard_volumes": 2, "min_extent_mm": 10.0,
        "max_cropped_fraction": 0.5, "warn_cropped_fraction": 0.4,
    }  # fmt: skip
    plan = pretrained.contract.plan.model_copy(update=same)
    assert plan.hash() != pretrained.contract.plan_hash
    pretrained.check(plan)


def test_a_damaged_checkpoint_is_passed_over_and_said(unbroken, tmp_path):
    run = copy(unbroken, tmp_path / "run")
    *_, before, last = files.directories(run / "checkpoints")
    with (last / files.WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    listed = sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.warns(UserWarning, match=f"passed over for {before.name}.*does not have the hash"):
        assert from_run(run).about["step"] == files.step_of(before)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == listed
    for path in files.directories(run / "checkpoints"):
        (path / files.WEIGHTS).unlink()
    with pytest.raises(InputError, match="none of the 2 checkpoints"):
        from_run(run)


def test_a_run_that_does_not_agree_with_itself_is_refused(unbroken, tmp_path):
    run = copy(unbroken, tmp_path / "run")
    about = json.loads((run / "run.json").read_text())
    for change, sentence in (
        ({"plan_hash": "0123456789" * 3 + "01"}, "tells of a store with plan 01234567"),
        ({"plan": {"orientaton": "LPS"}}, "cannot be read"),
        ({"plan": None}, "cannot be read"),
    ):
        (run / "run.json").write_text(json.dumps(about | {"store": about["store"] | change}))
        with pytest.raises(InputError, match=sentence):
            from_run(run)
    (run / "run.json").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        open_pretrained(run)
    for folder in (tmp_path, tmp_path / "nowhere", unbroken / "checkpoints"):
        with pytest.raises(InputError, match="is no run folder"):
            from_run(folder)


def test_a_run_of_before_counts_were_recorded(unbroken, tmp_path):
    run = copy(unbroken, tmp_path / "run")
    about = json.loads((run / "run.json").read_text())
    for name in ("subjects", "contrasts"):
        del about["store"][name]
    (run / "run.json").write_text(json.dumps(about))
    data = from_run(run).about["data"]
    assert "subjects" not in data and data["scans"] == 10


def test_settings_name_no_place(tiny_store, tmp_path):
    stores = f'[{{path="{tiny_store}",weight=1}},{{path="{tmp_path}",weight=2}}]'
    (tmp_path / "c.toml").write_text(TINY_CONFIG)
    from brainscale.pretrained import _without_paths

    settings = _without_paths(load(Config, tmp_path / "c.toml", (f"data.stores={stores}", f"run.dir={tmp_path}")))
    assert str(tmp_path) not in json.dumps(settings) and str(tiny_store) not in json.dumps(settings)
    assert [store["weight"] for store in Config.model_validate(settings).model_dump()["data"]["stores"]] == [1, 2]


def test_importing_the_package_is_light():
    code = "import sys, brainscale; print([m for m in ('torch', 'numpy', 'zarr', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        import brainscale

        brainscale.nothing  # noqa: B018
