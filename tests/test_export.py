"""Handing an encoder over: what is written, that it loads anywhere, and that nothing else is taken for it."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FULL, run_brainscale
from processes import finish, run_ranks, start_function
from safetensors.torch import load_file, save_file

from brainscale import checkpoint_files as files
from brainscale import encoder_files, load_encoder
from brainscale.config import Config
from brainscale.export import Words, export
from brainscale.pretrained import Pretrained, from_run
from brainscale.settings import InputError, load

VOLUMES = torch.randn((3, 16, 24, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(unbroken, tmp_path_factory) -> Path:
    return export(unbroken, tmp_path_factory.mktemp("exports") / "a")


def changed(exported: Path, folder: Path, **changes: object) -> Path:
    """A copy of an export with other values in its config.json; a dot in a key stands as two underscores."""
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tree = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        *groups, leaf = key.split("__")
        place = tree
        for group in groups:
            place = place[group]
        place[leaf] = value
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


def with_tensors(exported: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of an export with other tensors, and a config.json that names their size and hash."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    tree = json.loads((exported / "config.json").read_text())
    path = folder / "model.safetensors"
    tree["weights"] = {"num_bytes": path.stat().st_size, "sha256": encoder_files.file_sha256(path)}
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


def refused(folder: Path) -> str:
    """The one sentence that refuses a directory."""
    with pytest.raises(InputError) as error:
        load_encoder(folder)
    assert "\n" not in str(error.value) and ";" in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------- what is written


@torch.no_grad()
def test_an_export_computes_what_the_run_does(exported, unbroken):
    encoder, run = load_encoder(exported), from_run(unbroken)
    assert all(value.equal(run.state_dict()[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(encoder(VOLUMES), run(VOLUMES))
    assert (encoder.settings, encoder.contract, encoder.about) == (run.settings, run.contract, run.about)
    assert not encoder.training and Pretrained.from_pretrained(exported).contract == run.contract
    encoder.load_state_dict(load_file(exported / "model.safetensors"))  # as Hugging Face's mixin reads it: strictly


def test_two_exports_are_the_same_bytes(exported, unbroken, tmp_path):
    (tmp_path / "b").mkdir()  # an empty folder is as good as none
    export(unbroken, tmp_path / "b")
    names = {path.name for path in exported.iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md"}
    assert all((tmp_path / "b" / name).read_bytes() == (exported / name).read_bytes() for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert all(path.stat().st_mode & 0o044 for path in exported.iterdir())


def test_an_export_names_no_scan_and_no_path(exported, tiny_store, unbroken):
    text = "".join((exported / name).read_text() for name in ("config.json", "README.md"))
    for secret in ("sub-0", str(tiny_store), str(unbroken), str(unbroken.parent), ".nii"):
        assert secret not in text
    data = json.loads((exported / "config.json").read_text())["about"]["data"]
    assert data["scans"] == 10 and data["subjects"] == 5 and data["contrasts"] == {"T1w": 10}


def test_the_card(unbroken, tmp_path):
    odd = 'we | they: "x"\n# no head'
    text = (export(unbroken, tmp_path / "a", words=Words(odd, odd, "DUA 7")) / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == odd and yaml.safe_load(head)["pipeline_tag"] == "image-feature-extraction"
    assert '# we \\| they: "x" # no head\n' in body and "\n# no head" not in body
    assert "| licence of the data | DUA 7 |" in body and "| of them trained on | 6 |" in body
    assert from_run(unbroken).contract.plan_hash in body and "40 steps, 160 samples" in body
    assert "None recorded" in body and "| contrast T1w | 10 scans |" in body and "not a medical device" in body
    settings = body.split("```toml\n")[1].split("```")[0]
    (tmp_path / "settings.toml").write_text(settings)
    assert load(Config, tmp_path / "settings.toml").optim.lr == 3e-3
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert rows and all(line.endswith("|") for line in rows)


def scores(weights: str) -> dict[str, object]:
    """A record of an evaluation of the run at step 40, with these weights."""
    encoders = [
        {"name": "mae", "kind": "run", "source": "/secret/place", "objective": "mae", "step": 40, "weights": weights},
        {"name": "random", "kind": "baseline", "source": None},
    ]
    found = [
        {"encoder": "mae", "probe": "linear", "metric": "auroc", "value": 0.71234, "low": 0.55, "high": None},
        {"encoder": "random", "probe": "knn", "metric": "auroc", "value": 0.5, "low": 0.4, "high": 0.6},
    ]
    task = {
        "name": "sex", "kind": "binary", "column": "gender", "subjects": 47, "scans": 47, "design": "holdout",
        "scores": found,
    }  # fmt: skip
    return {"schema": 1, "plan_hash": "ab", "encoders": encoders, "tasks": [task]}


def linked(run: Path, folder: Path) -> Path:
    """A run folder whose files are links to another's, so that it can be given more."""
    folder.mkdir()
    for path in run.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_scores_in_the_card(unbroken, tmp_path):
    run = linked(unbroken, tmp_path / "run")
    (run / "evaluation").mkdir()
    path = run / "evaluation" / "scores.json"
    path.write_text(json.dumps(scores(from_run(run).fingerprint())))
    card = (export(run, tmp_path / "a") / "README.md").read_text()
    assert "| sex | 47 | holdout | mae | linear | auroc | 0.712 | 0.550 to – | – |" in card
    assert "| random | baseline |  |  |" in card and "None of these" not in card and "/secret" not in card
    path.write_text(json.dumps(scores("those of another training")))
    card = (export(run, tmp_path / "b") / "README.md").read_text()
    assert "None of these encoders is the exported one (mae, step 40)" in card
    path.write_text("{")
    with pytest.raises(InputError, match=r"scores\.json is not valid JSON"):
        export(run, tmp_path / "c")
    assert not (tmp_path / "c").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "run"]


def test_a_place_that_is_taken_is_refused(unbroken, exported, tmp_path):
    before = (exported / "config.json").read_bytes()
    (tmp_path / "file").write_text("")
    for place in (exported, tmp_path / "file"):
        with pytest.raises(InputError, match="is not an empty folder"):
            export(unbroken, place)
    assert (exported / "config.json").read_bytes() == before


@pytest.mark.slow
def test_the_command_and_a_process_without_deepspeed_and_triton(unbroken, tmp_path):
    """`brainscale export`, then two lines where DeepSpeed, Triton and the kernels cannot be imported."""
    done = run_brainscale("export", unbroken, tmp_path / "a", "--licence", "mit", "--data-license", "none")
    assert done.stdout.strip() == str(tmp_path / "a")
    assert yaml.safe_load((tmp_path / "a" / "README.md").read_text().split("---\n")[1])["license"] == "mit"
    torch.save(VOLUMES, tmp_path / "volumes.pt")
    code = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "triton", "brainscale_kernels"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Without())
import brainscale
assert "torch" not in sys.modules
encoder = brainscale.load_encoder(sys.argv[1] + "/a")
import torch
volumes = torch.load(sys.argv[1] + "/volumes.pt", weights_only=True)
torch.save(encoder(volumes).detach(), sys.argv[1] + "/features.pt")
assert not {"deepspeed", "triton", "brainscale_kernels"} & set(sys.modules)
"""
    run = [sys.executable, "-c", code, str(tmp_path)]
    finished = subprocess.run(run, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr
    found = torch.load(tmp_path / "features.pt", weights_only=True)
    torch.testing.assert_close(found, from_run(unbroken)(VOLUMES).detach(), atol=1e-5, rtol=0)


def test_a_full_disk_leaves_nothing_behind(unbroken, small_disk):
    (small_disk / "filler").write_bytes(bytes(4 * 1024 * 1024 - 64 * 1024))
    with pytest.raises(InputError, match=r"cannot be written .No space left on device.; make room"):
        export(unbroken, small_disk / "a")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_the_hub_by_name(exported, tmp_path, monkeypatch):
    """A repository in huggingface_hub's cache, as a download leaves it, without a network."""
    pytest.importorskip("huggingface_hub", reason="optional: pip install huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--someone--brains"
    shutil.copytree(exported, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    code = """
import sys
from brainscale.pretrained import Pretrained
from brainscale.settings import InputError
print(Pretrained.from_pretrained("someone/brains").about["step"])
for name in ("someone/else", "no/such/name"):
    try:
        Pretrained.from_pretrained(name)
    except InputError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "40" and len(lines) == 3
    assert all("cannot be fetched from the hub" in line for line in lines[1:])


def test_rotary_positions_do_not_go_to_other_libraries(unbroken, tmp_path):
    for form in ("monai", "timm"):
        with pytest.raises(InputError, match="has no rotary positions"):
            export(unbroken, tmp_path / form, form=form)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- what is not taken for one


def test_no_export_at_all(exported, unbroken, tmp_path):
    assert "has no config.json" in refused(tmp_path / "nowhere")
    assert "has no config.json" in refused(exported / "model.safetensors")
    assert "has no config.json" in refused(unbroken)
    (tmp_path / "global_step100").mkdir()
    (tmp_path / "global_step100" / "mp_rank_00_model_states.pt").write_bytes(b"PK\x03\x04")
    assert "has no config.json" in refused(tmp_path / "global_step100")
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert "has no config.json" in refused(tmp_path)


def test_a_config_of_another_program(exported, tmp_path):
    bert = changed(exported, tmp_path / "bert")
    (bert / "config.json").write_text('{"model_type": "bert", "hidden_size": 768}')
    assert "was not written by brainscale" in refused(bert)
    for number, text in enumerate(("", "{", "[]", "[" * 100_000, "\xff", '"x"', "null")):
        folder = changed(exported, tmp_path / str(number))
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        assert "not valid JSON" in refused(folder) or "not written by brainscale" in refused(folder)
    long = changed(exported, tmp_path / "long", about__note="x" * (1 << 20))
    assert "more than 1048576 bytes" in refused(long)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format_version": 2}, "format_version 2, and this version of brainscale reads 1"),
        ({"format": "monai-vit"}, 'its "format" is not "brainscale-encoder"'),
        ({"pickle": "x"}, "pickle: Extra inputs"),
        ({"model__width": -3}, "model.width"),
        ({"model__heads": 5}, "even multiple of its 5 heads"),
        ({"model__depth": 10**9}, "and a model of the settings in config.json"),
        ({"model__width": 2 * 10**9}, "and a model of the settings in config.json"),
        ({"model__patch_voxels_zyx": [10**6, 10**6, 10**6]}, "and a model of the settings in config.json"),
        ({"contract__volume_zyx": [8 * 10**4] * 3}, "tokens, more than"),
        ({"contract__volume_zyx": [8, 8, 9]}, "no multiple of the patch"),
        ({"contract__plan_hash": "x"}, "contract.plan_hash"),
        ({"contract__plan__spacing_mm_xyz": "native?"}, "contract.plan.spacing_mm_xyz"),
        ({"weights__sha256": "0" * 64}, "does not have the SHA-256"),
        ({"weights__num_bytes": 5}, "bytes and config.json says 5"),
        ({"model__depth": 2}, "lacks 12 of the 28 tensors"),
    ],
)
def test_settings_that_cannot_be(changes, sentence, exported, tmp_path):
    if changes == {"model__depth": 2}:  # one block is missing, in a file that is large enough for it
        tensors = {**load_file(exported / "model.safetensors"), "more": torch.zeros(8000)}
        folder = changed(with_tensors(exported, tmp_path / "a", tensors), tmp_path / "b", **changes)
    else:
        folder = changed(exported, tmp_path / "b", **changes)
    assert sentence in refused(folder)


def test_damaged_weights(exported, tmp_path):
    whole = (exported / "model.safetensors").read_bytes()
    for name, content in (("short", whole[:-1]), ("empty", b""), ("long", whole + b"\0")):
        folder = changed(exported, tmp_path / name)
        (folder / "model.safetensors").write_bytes(content)
        assert f"has {len(content)} bytes and config.json says {len(whole)}" in refused(folder)
    flipped = changed(exported, tmp_path / "flipped")
    (flipped / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "does not have the SHA-256" in refused(flipped)
    gone = changed(exported, tmp_path / "gone")
    (gone / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refused(gone)


def test_tensors_of_another_model(exported, tmp_path):
    """Their sizes and hashes are those of config.json, so that only looking at the tensors finds it."""
    tensors = load_file(exported / "model.safetensors")
    first, *_ = tensors
    monai = {name.replace("encoder.trunk.", ""): value for name, value in tensors.items()}
    timm = {name.replace("attention.project", "attn.proj"): value for name, value in tensors.items()}
    less = {name: value for name, value in tensors.items() if name != first} | {
        "pad": torch.zeros(tensors[first].shape)
    }
    assert "of the 16 tensors of this model" in refused(with_tensors(exported, tmp_path / "monai", monai))
    assert "lacks 2 of the 16 tensors" in refused(with_tensors(exported, tmp_path / "timm", timm))
    assert f"lacks 1 of the 16 tensors of this model ({first}" in refused(with_tensors(exported, tmp_path / "l", less))
    more = with_tensors(exported, tmp_path / "more", {**tensors, "head.weight": torch.zeros(5)})
    assert "holds other tensors as well (head.weight" in refused(more)
    other = {name: value.double() if name == first else value for name, value in tensors.items()}
    assert f"{first} is F64" in refused(with_tensors(exported, tmp_path / "double", other))
    name = "encoder.embed.weight"
    turned = with_tensors(exported, tmp_path / "turned", {**tensors, name: tensors[name].T.contiguous()})
    assert f"{name} is F32 of shape [512, 24], and must be F32 of shape [24, 512]" in refused(turned)
    junk = changed(exported, tmp_path / "junk")
    content = bytes(len((exported / "model.safetensors").read_bytes()))
    (junk / "model.safetensors").write_bytes(content)
    tree = json.loads((junk / "config.json").read_text())
    tree["weights"]["sha256"] = encoder_files.file_sha256(junk / "model.safetensors")
    (junk / "config.json").write_text(json.dumps(tree))
    assert "is not a safetensors file" in refused(junk)


# ------------------------------------------------------------------------------------ whichever way it was trained


def save_again(config: Config, run: Path, root: Path) -> None:
    """Collective: put a run's checkpoint into an engine of these settings, and save that engine."""
    from brainscale import checkpoint, distributed, session

    world = distributed.find()
    distributed.start(world)
    found = checkpoint.newest(run / "checkpoints", world)
    ready = session.build(config, run, world, found)
    assert ready is not None and ready.state.zero_stage == config.zero.stage and world.size == ready.state.world_size
    saver = checkpoint.Saver(ready.engine, root / "checkpoints", world, config.checkpoint)
    saver.save(ready.state, wait=True)
    saver.close()
    distributed.wait(world)
    distributed.leave(0)


JEPA = ('objective="jepa"', "jepa.predictor_width=12", "jepa.predictor_depth=1", "jepa.predictor_heads=1")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), JEPA] if FULL else [JEPA])
def test_zero_3_on_two_ranks_exports_what_zero_1_on_one_does(more, tiny_store, tiny_config, tmp_path):
    """A checkpoint that was put into engines of two ranks at stage 3, and saved by them, exports the same bits. The
    same training on two ranks at stage 3 adds gradients in another order, so it agrees as far as fp32 sums do:
    3e-6 was measured, in steps that move weights by 2e-2."""
    common = (f"data.store={tiny_store}", "train.num_steps=12", "train.micro_batch_volumes=2", *more)
    ends = {}
    for ranks, stage in ((1, 1), (2, 3)):
        run = tmp_path / f"{ranks}"
        arguments = ("pretrain", tiny_config, *common, f"run.dir={run}", f"zero.stage={stage}")
        run_ranks(*arguments, ranks=ranks, logs=tmp_path / "logs")
        ends[ranks] = run
    assert files.read_state(files.directories(ends[2] / "checkpoints")[-1]).zero_stage == 3
    again = tmp_path / "again"
    again.mkdir()
    for name in ("config.toml", "run.json"):
        (again / name).write_bytes((ends[1] / name).read_bytes())
    settings = (*common, "zero.stage=3", "train.num_steps=13")
    function = partial(save_again, load(Config, tiny_config, settings), ends[1], again)
    finish(start_function(function, ranks=2, logs=tmp_path / "logs"))
    for part in ("encoder", "teacher") if more else ("encoder",):
        one, three, apart = (export(run, tmp_path / f"{part}-{run.name}", part) for run in (ends[1], again, ends[2]))
        assert (one / "model.safetensors").read_bytes() == (three / "model.safetensors").read_bytes()
        weights, other = (load_file(folder / "model.safetensors") for folder in (one, apart))
        for name, value in weights.items():
            torch.testing.assert_close(other[name], value, atol=2e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
        with torch.no_grad():
            torch.testing.assert_close(load_encoder(apart)(VOLUMES), load_encoder(one)(VOLUMES), atol=5e-5, rtol=0)
