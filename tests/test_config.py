"""Settings: strict, complete, readable back; one sentence for each mistake; every shipped file loads and dry-runs."""

from pathlib import Path

import pytest

from brainscale.cli import dry_run_text
from brainscale.config import Config
from brainscale.prep_plan import Plan
from brainscale.settings import InputError, changed_keys, load, to_toml

CONFIGS = Path(__file__).parent.parent / "configs"


def test_misspelt_key_names_the_right_one():
    with pytest.raises(InputError, match=r"unknown key 'train\.num_step'; did you mean 'num_steps'") as caught:
        load(Config, None, ("train.num_step=3",))
    assert "global_batch_volumes" in str(caught.value), "the valid keys are listed"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("mask.fraction=1.5", "mask.fraction = 1.5"),
        ("model.width=abc", "model.width = 'abc'"),
        ("model.heads=7", "even multiple of its 7 heads"),
        ("num_steps", "key=value"),
        ("seed.x=1", "seed"),
        ("objective=jepb", "objective"),
        ("optim.warmup_steps=100000", "below train.num_steps"),
        ("checkpoint.keep_last=1", "checkpoint.keep_last"),
        ("optim.cooldown_steps=10", 'needs optim.schedule = "cooldown"'),
        ("regularizer.kind=vcr", 'is for objective = "jepa"; set it to'),
        ("mask.block_fractions=[[0.5,0.2]]", "pairs that rise within 0..1"),
        ("mask.block_fractions=[[0.0,0.01]]", "64 blocks of that size, the most that are drawn"),
        ("mask.block_aspect=[2.0,1.0]", "must rise and be positive"),
        ("jepa.predictor_heads=7", "even multiple of its 7 heads"),
        ("optim.lr=inf", "optim.lr = inf: input should be a finite number"),
        ("data.sampler=weighted", "need each other"),
        ("data.weights={T1w=1}", "need each other"),
        ("data.weights=3", "data.weights = 3"),
        ("data.stores=[3]", "data.stores.0 = 3"),
        ("data.stores=[{path='a'}]", "data.stores.0.weight"),
        ("data.stores=[{path='a',weight=0}]", "data.stores.0.weight = 0: input should be greater than 0"),
        ("data.stores=[{path='a',weight=1},{path='a',weight=1}]", "names a store twice"),
    ],
)
def test_bad_values_are_one_sentence(override, part):
    with pytest.raises(InputError) as caught:
        load(Config, None, ("seed=1", override))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_contradict_each_other():
    both = ("objective=jepa", "regularizer.kind=vcr", "regularizer.compat=paper")
    with pytest.raises(InputError, match=r"masks are drawn per sample; set mask\.shared = true"):
        load(Config, None, both)
    assert load(Config, None, (*both, "mask.shared=true")).regularizer.compat == "paper"
    with pytest.raises(InputError, match=r"set mask\.shared = false"):
        load(Config, None, ("mask.shared=true", "mask.foreground_aware=true"))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(InputError, match="no such config file"):
        load(Config, tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [1,\n")
    with pytest.raises(InputError, match="not valid TOML"):
        load(Config, tmp_path / "bad.toml")


def test_overrides_are_toml_or_strings():
    config = load(Config, None, ("data.store=/a b/c", "model.patch_voxels_zyx=[8, 8, 16]", "train.grad_clip=0.5"))
    assert config.data.store == "/a b/c"
    assert config.model.patch_voxels_zyx == (8, 8, 16)
    assert config.train.grad_clip == 0.5


def test_effective_settings_read_back(tmp_path):
    config = load(Config, None, ('data.store=ü"\\x', "optim.lr=1e-7", "data.crop_voxels_zyx=[16,16,16]"))
    (tmp_path / "effective.toml").write_text(to_toml(config), encoding="utf-8")
    assert load(Config, tmp_path / "effective.toml") == config


ODD_NAMES = ("T1w", "", "1.5 T", 'a"b', "c\\d", "ü=", "{x", "\x7f\t\n")


def test_groups_inside_a_value_read_back(tmp_path):
    """Tables in tables and lists of them, whatever their keys are called and however small a weight is."""
    data = {
        "sampler": "weighted",
        "weights": {name: 10.0 ** (7 * at - 20) for at, name in enumerate(ODD_NAMES)},
        "stores": [{"path": f"stores/{name}", "weight": 3e-8 + at} for at, name in enumerate(ODD_NAMES)],
    }
    config = Config.model_validate({"data": data})
    (tmp_path / "effective.toml").write_text(to_toml(config), encoding="utf-8")
    again = load(Config, tmp_path / "effective.toml")
    assert again == config and again.data.weights == data["weights"]
    assert [entry.model_dump() for entry in again.data.stores] == data["stores"]


def test_weights_and_stores_are_overridden(tmp_path):
    """A whole table, one key of it, a list of tables; one key leaves the file's others as they are."""
    config = load(Config, None, ("data.sampler=weighted", "data.weights={T1w=1,FLAIR=2}"))
    assert config.data.weights == {"T1w": 1.0, "FLAIR": 2.0}
    (tmp_path / "weights.toml").write_text(to_toml(config))
    config = load(Config, tmp_path / "weights.toml", ("data.weights.T1w=2", "data.weights.T2w=0"))
    assert config.data.weights == {"T1w": 2.0, "FLAIR": 2.0, "T2w": 0.0}
    config = load(Config, None, ('data.stores=[{path="a",weight=1},{path="b c",weight=0.5}]',))
    assert [(entry.path, entry.weight) for entry in config.data.stores] == [("a", 1.0), ("b c", 0.5)]


def test_misspelt_keys_inside_a_list_name_the_right_one():
    with pytest.raises(InputError, match=r"unknown key 'data\.stores\.1\.wieght'; did you mean 'weight'") as caught:
        load(Config, None, ('data.stores=[{path="a",weight=1},{path="b",weight=1,wieght=2}]',))
    assert str(caught.value).endswith("Valid keys here: path, weight")


def test_changed_keys_inside_lists_are_named():
    """Entry by entry where there are as many; else the lists differ as a whole."""
    one, two, three = (
        load(Config, None, (f"data.stores=[{stores}]",)).model_dump(mode="json")
        for stores in (
            '{path="a",weight=1},{path="b",weight=1}',
            '{path="c",weight=1},{path="b",weight=2}',
            '{path="a",weight=1}',
        )
    )
    assert changed_keys(one, two) == [("data.stores.0.path", "a", "c"), ("data.stores.1.weight", 1.0, 2.0)]
    assert [key for key, _, _ in changed_keys(one, three)] == ["data.stores"]


def test_changed_keys_are_named():
    old, new = (load(Config, None, (f"optim.lr={lr}", f"seed={s}")).model_dump() for lr, s in ((1e-3, 0), (2e-3, 1)))
    assert changed_keys(old, new) == [("optim.lr", 1e-3, 2e-3), ("seed", 0, 1)]


def test_plan_hash_depends_on_every_setting():
    plan = Plan()
    others = {
        "grid_voxels_xyz": (80, 96, 80), "spacing_mm_xyz": "native", "crop": "centre", "top_margin_mm": 4.0,
        "foreground": "otsu", "foreground_cell_voxels": 8, "max_cropped_fraction": 0.3, "warn_cropped_fraction": 0.02,
        "clip_percentiles": (1.0, 99.0), "dtype": "uint8", "quanta_per_std": 256.0, "codec": "zstd",
        "chunk_voxels_zyx": (8, 8, 8), "shard_volumes": 4, "orientation": "LPS", "assume_orientation": "RAS",
        "frame": 0, "min_extent_mm": 30.0, "normalize": "none",
    }  # fmt: skip
    assert set(others) == set(Plan.model_fields)
    hashes = {Plan(**{name: value}).hash() for name, value in others.items()} | {plan.hash()}
    assert len(hashes) == len(others) + 1


RUNS = sorted(path for path in CONFIGS.rglob("*.toml") if path.parent.name not in ("prep", "tasks", "compare"))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_shipped_configs_say_what_they_are_and_dry_run(path):
    head = path.read_text(encoding="utf-8").split("\nobjective")[0]
    assert "# Run:" in head and "# Came out:" in head
    text = dry_run_text(load(Config, path))
    assert "parameters" in text and "FLOPs per sample" in text


@pytest.mark.parametrize("path", sorted((CONFIGS / "prep").glob("*.toml")), ids=lambda p: p.name)
def test_shipped_plans_load(path):
    assert path.read_text(encoding="utf-8").startswith("#")
    load(Plan, path)
