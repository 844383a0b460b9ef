"""A run goes on with any number of ranks, ZeRO stage and accumulation; with the same ones, bit for bit."""

from pathlib import Path

import pytest
from conftest import chosen, losses
from processes import run_ranks

from brainscale import checkpoint_files as files

FLAT = ("optim.final_lr_fraction=1.0", "train.num_steps=20", "train.micro_batch_volumes=2")


@pytest.fixture(scope="module")
def whole(tiny_store, tiny_config, tmp_path_factory) -> Path:
    """Twenty steps of one rank at stage 1, unbroken."""
    run = tmp_path_factory.mktemp("elastic") / "whole"
    run_ranks("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", *FLAT, logs=run.parent)
    return run


def leg(config: Path, store: Path, run: Path, ranks: int, stage: int, until: int | None, *more: str) -> str:
    """Train on from what is there to step `until` (None: the end), stopped by a signal; the output of rank 0."""
    done = [files.read_state(path).step for path in files.directories(run / "checkpoints")]
    hit = until and (until - max(done, default=0) - 1)
    faults = f"step.data:term@rank={ranks - 1}@hit={hit}" if until else ""
    common = ("pretrain", config, f"data.store={store}", f"run.dir={run}", *FLAT, f"zero.stage={stage}", *more)
    code = 75 if until else 0
    return run_ranks(*common, ranks=ranks, faults=faults, code=code, logs=run.parent / "logs")[0].text


def assert_close(run: Path, whole: Path) -> None:
    wanted = losses(whole)
    assert losses(run).keys() == wanted.keys()
    for step, loss in losses(run).items():
        assert loss == pytest.approx(wanted[step], rel=1e-3), f"step {step}"


def test_other_ranks_and_stages_follow_the_same_path(whole, tiny_store, tiny_config, tmp_path):
    """World size 1 → 2 → 4 → 1 and ZeRO stage 1 → 3 → 2 → 0, accumulation 2 → 1 → 1 → 4. That losses agree also says
    that the samples came in the same order: another order changes them in the first digit."""
    run = tmp_path / "run"
    leg(tiny_config, tiny_store, run, 1, 1, 5)
    text = leg(tiny_config, tiny_store, run, 2, 3, 10)
    assert "resumed from" in text and "saved by 1 rank(s) × 2 volume(s) × 2 accumulated, ZeRO stage 1" in text
    leg(tiny_config, tiny_store, run, 4, 2, 15)
    leg(tiny_config, tiny_store, run, 1, 0, None, "train.micro_batch_volumes=1")
    assert_close(run, whole)
    states = [files.read_state(path) for path in files.directories(run / "checkpoints")]
    assert [(s.step, s.cursor, s.updates) for s in states] == [(16, 64, 16), (20, 80, 20)]


@pytest.mark.slow
@pytest.mark.parametrize("path", [((2, 0), (1, 3)), ((1, 2), (2, 0)), ((2, 2), (2, 3)), ((4, 3), (2, 1))])
def test_crosswise(path, whole, tiny_store, tiny_config, tmp_path):
    """(ranks, stage) of the first ten steps and of the last ten."""
    for (ranks, stage), until in zip(path, (10, None)):
        leg(tiny_config, tiny_store, tmp_path / "run", ranks, stage, until)
    assert_close(tmp_path / "run", whole)


@pytest.mark.slow
def test_offload_and_recomputing_follow_the_same_path(whole, tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    leg(tiny_config, tiny_store, run, 2, 2, 7, "zero.offload_optimizer=true")
    leg(tiny_config, tiny_store, run, 2, 3, 14, "zero.offload_optimizer=true", "train.activation_checkpointing=true")
    leg(tiny_config, tiny_store, run, 1, 1, None, "zero.offload_optimizer=true")
    assert_close(run, whole)


SAME = [(1, 1, "fp32"), (2, 3, "fp32"), (2, 1, "bf16")]
ALL = [(ranks, stage, kind) for ranks in (1, 2) for stage in (0, 1, 2, 3) for kind in ("fp32", "bf16")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "precision"),
    chosen(SAME, [case for case in ALL if case[1:] != (0, "bf16")], 5),
)
def test_the_same_ranks_and_stage_give_the_same_bits(ranks, stage, precision, tiny_store, tiny_config, tmp_path):
    """Stopped by a signal after step 7 and continued, against unbroken; accumulation 2 on one rank."""
    more = (f'train.precision="{precision}"', "train.num_steps=14")
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    leg(tiny_config, tiny_store, broken, ranks, stage, 7, *more)
    leg(tiny_config, tiny_store, broken, ranks, stage, None, *more)
    leg(tiny_config, tiny_store, unbroken, ranks, stage, None, *more)
    assert losses(broken) == losses(unbroken) and len(losses(broken)) == 14
    one, other = (files.read_weights(run / "checkpoints" / "step-00000014") for run in (broken, unbroken))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
