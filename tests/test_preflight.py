"""Before step 1: ranks that are not alike, or share no disk, or a full one, end with one sentence and code 2."""

import json
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY_GRID_ZYX, refusal, write_tiny_store
from processes import Rank, finish, run_ranks, start_function

from brainscale import checkpoint_files as files
from brainscale import preflight, run_disk
from brainscale.config import Config
from brainscale.distributed import World
from brainscale.objective import on_meta
from brainscale.preflight import Facts
from brainscale.prep_plan import Plan
from brainscale.settings import InputError, load


def pretrain(
    arguments: list[str],
    folder: Path,
    node: str = "a",
    clock_s: float = 0.0,
    torch_version: str = "",
    seen_s: float = 10.0,
) -> None:
    """`brainscale pretrain` in a folder, on a node of this name and clock, where another torch may be installed."""
    from brainscale import cli, provenance

    os.chdir(folder)
    os.environ["SLURMD_NODENAME"] = node
    right_s, versions = preflight.now_s, provenance.versions
    preflight.now_s = lambda: right_s() + clock_s
    if torch_version:
        provenance.versions = lambda: versions() | {"torch": torch_version}
    run_disk.SEEN_S = seen_s
    cli.main(arguments)


def two(
    common: Sequence[str | Path], logs: Path, *, more: Sequence[str] = (), folder: Path | None = None, **of_rank_1
) -> list[Rank]:
    """Two ranks in `logs`, of which rank 1 has more arguments, another folder, or what `pretrain` takes."""
    arguments = ["pretrain", *map(str, common)]
    functions = [
        partial(pretrain, arguments, logs),
        partial(pretrain, [*arguments, *more], folder or logs, node="b", **of_rank_1),
    ]
    return finish(start_function(functions, ranks=2, logs=logs / "logs"), code=2, timeout_s=60)


def sentence(ranks: list[Rank], run: Path) -> str:
    """What rank 0 says for all, once, which is also in exit.json."""
    lines = [line for rank in ranks for line in rank.text.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in ranks[0].text + ranks[1].text, lines
    told = json.loads((run / "exit.json").read_text())
    assert told["code"] == 2 and lines[0] == f"error: {told['sentence']}"
    assert not list(run.glob(".preflight-*")) and not (run / "metrics.jsonl").exists()
    return told["sentence"]


def test_settings_that_differ_are_named_with_both_values(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    ranks = two((tiny_config, f"data.store={tiny_store}", f"run.dir={run}"), tmp_path, more=["optim.lr=0.001"])
    said = sentence(ranks, run)
    assert "rank 1 on b and rank 0 on a have different settings (optim.lr: 0.001 on rank 1, 0.003 on rank 0)" in said
    assert "same config file" in said


def test_another_torch_on_a_node_is_named(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    ranks = two((tiny_config, f"data.store={tiny_store}", f"run.dir={run}"), tmp_path, torch_version="2.0.1")
    said = sentence(ranks, run)
    assert "different versions (torch: '2.0.1' on rank 1" in said and "environment" in said


def test_clocks_that_are_apart_are_named(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    ranks = two((tiny_config, f"data.store={tiny_store}", f"run.dir={run}"), tmp_path, clock_s=-3600.0)
    assert "the clock of rank 1 on b is 3600 s behind that of rank 0 on a" in sentence(ranks, run)


def test_a_store_that_a_node_has_otherwise_or_not_at_all_is_named(tiny_store, tiny_config, tmp_path):
    run, here, there = tmp_path / "run", tmp_path / "store", tmp_path / "there"
    shutil.copytree(tiny_store, here)
    there.mkdir()
    common = (tiny_config, "data.store=store", f"run.dir={run}")
    said = sentence(two(common, tmp_path, folder=there), run)
    assert "rank 1 on b cannot read the store store, which the others can (store/COMPLETE.json: No such file" in said
    write_tiny_store(there / "store", scans=8)
    said = sentence(two(common, tmp_path, folder=there), run)
    assert "rank 1 on b and rank 0 on a see different stores at store" in said and "copy the same store" in said


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared_is_named(tiny_store, tiny_config, tmp_path):
    """Rank 1 has no such folder; or it has one, which is another."""
    run, there = tmp_path / "run", tmp_path / "there"
    there.mkdir()
    common = (tiny_config, f"data.store={tiny_store}", "run.dir=run")
    for _ in range(2):
        said = sentence(two(common, tmp_path, folder=there, seen_s=0.5), run)
        assert f"rank 1 on b does not see what rank 0 on a writes in the run folder ({there / 'run'} and {run})" in said
        (there / "run").mkdir(exist_ok=True)
    assert not list((there / "run").iterdir())


def test_a_healthy_start_leaves_nothing_behind(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".preflight-of-a-killed-one-0").touch()
    common = ("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "train.num_steps=3")
    run_ranks(*common, ranks=2, logs=tmp_path)
    assert not list(run.glob(".preflight-*"))


# ------------------------------------------------------------------------------------------------ room


@pytest.mark.parametrize("objective", ["mae", "jepa"])
def test_the_predicted_size_of_a_state_is_that_of_its_files(objective, tiny_store, tiny_config, tmp_path):
    run, more = tmp_path / "run", (f"objective={objective}", "train.num_steps=3")
    run_ranks("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", *more, logs=tmp_path)
    state = files.directory(run / "checkpoints", 3)
    tensors = sum((state / name).stat().st_size for name in (files.WEIGHTS, files.OPTIMIZER))
    predicted = run_disk.state_bytes(on_meta(load(Config, tiny_config, more), TINY_GRID_ZYX))
    headers = 200 * len(files.Reader(state).names()) * 3
    assert predicted <= tensors <= predicted + headers


def test_a_disk_without_room_for_a_state_is_refused(tiny_store, tiny_config, small_disk):
    """With room for one, and not for all that are kept, it is a warning; what is there already counts as kept."""
    config = load(Config, tiny_config, (f"data.store={tiny_store}", "checkpoint.keep_last=4"))
    state = run_disk.state_bytes(on_meta(config, TINY_GRID_ZYX))
    run, filler = small_disk / "run", small_disk / "filler"
    run.mkdir()

    def leave_free(size: float, by: Path) -> None:
        by.write_bytes(b"")
        by.write_bytes(bytes(int(shutil.disk_usage(small_disk).free - size)))

    assert run_disk.room(config, run) == ("", "")
    leave_free(2.5 * state, filler)
    problem, warning = run_disk.room(config, run)
    assert not problem and "WARNING" in warning and "5 more states" in warning
    for step in (4, 8, 12):
        files.directory(run / "checkpoints", step).mkdir(parents=True)
    assert run_disk.room(config, run) == ("", ""), "two more, and there is room for them"

    leave_free(0.5 * state, filler)
    arguments = (f"data.store={tiny_store}", f"run.dir={run}", "train.num_steps=12")
    assert run_disk.room(load(Config, tiny_config, arguments), run) == ("", ""), "a finished run writes none"
    shutil.rmtree(run / "checkpoints")
    said = refusal(2, "pretrain", tiny_config, *arguments)
    assert f"are free on its disk, and one state of this model takes {state / 1e9:.3g} GB; make room" in said

    litter = run / "checkpoints" / ".tmp-step-00000004-1" / files.WEIGHTS
    litter.parent.mkdir(parents=True)
    filler.unlink()
    leave_free(0.5 * state, litter)
    assert run_disk.room(config, run) == ("", ""), "what a killed save left is swept"
    leave_free(0, litter)
    with pytest.raises(InputError, match=r"rank 0 on a cannot write in the run folder .*No space left on device"):
        run_disk.shared(run, World(0, 1, 0, torch.device("cpu"), "single"), ["a"])


# ------------------------------------------------------------------------------------------------ ranks in numbers


def facts(**changes) -> Facts:
    return Facts(**{"node": "a", "clock_s": 0.0, "settings": {}, "versions": {}, "stores": {"s": ("1", "")}, **changes})


def test_many_ranks_are_told_in_few_words():
    every = [facts(), *(facts(node=f"node-{rank // 8}", versions={"zarr": "2"}) for rank in range(1, 64))]
    said = preflight.different(every)
    assert (
        "ranks 1, 2, 3, 4, 5, 6, 7, 8, … (63 in all) on node-0, node-1, " in said
        and "zarr: '2' on rank 1, None" in said
    )
    assert len(said) < 400


def test_a_store_that_no_rank_reads_is_left_to_who_opens_it():
    assert preflight.different_stores([facts(stores={"s": ("", "gone")})] * 2) == ""
    assert "rank 0 on a cannot" in preflight.different_stores([facts(stores={"s": ("", "gone")}), facts(node="b")])


def test_alike_is_alike():
    every = [facts(), facts(node="b", clock_s=preflight.CLOCK_S)]
    assert not preflight.different(every) + preflight.clocks_apart(every) + preflight.different_stores(every)
    every[1] = facts(node="b", clock_s=preflight.CLOCK_S + 1)
    assert "61 s ahead of that of rank 0 on a" in preflight.clocks_apart(every)


def test_the_hash_of_a_store_is_of_its_plan_and_all_its_files(tiny_store, tmp_path):
    same = shutil.copytree(tiny_store, tmp_path / "same")
    assert preflight.store_hash(same) == preflight.store_hash(tiny_store)
    other = write_tiny_store(tmp_path / "other", plan=Plan(grid_voxels_xyz=TINY_GRID_ZYX[::-1], shard_volumes=2))
    assert preflight.store_hash(other) != preflight.store_hash(tiny_store)
