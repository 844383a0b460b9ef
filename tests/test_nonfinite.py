"""A step that is not finite is left out on every rank, recorded, and can be done again."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import losses, run_brainscale, write_tiny_store
from processes import finish, run_ranks, start_function

from brainscale import checkpoint_files as files
from brainscale import metrics
from brainscale.checkpoint_files import Reader
from brainscale.nonfinite import guarded

BAD = "sub-08_ses-1_T1w"
"""A scan whose voxels become NaN when they are normalised."""


@pytest.fixture(scope="module")
def bad_store(tmp_path_factory) -> Path:
    """Forty scans, one of them with a standard deviation that is hardly above 0."""

    def spoil(record):
        if record["id"] == BAD:
            record["std"] = 1e-45

    return write_tiny_store(tmp_path_factory.mktemp("bad") / "store", scans=40, change=spoil)


def common(config, store, run):
    return ("pretrain", config, f"data.store={store}", f"run.dir={run}")


def test_the_loss_is_differentiated_as_it_is_or_not_at_all():
    value = torch.tensor(3.0, requires_grad=True)
    guarded(value * 2).backward()
    assert value.grad == 2.0
    value.grad = None
    guarded(value * 0 + torch.tensor(math.inf)).backward()
    assert torch.isnan(value.grad)


CASES = [(2, 1, ""), (1, 0, "")]
OTHERS = [
    (2, 3, ""),
    (2, 0, ""), (2, 2, ""), (1, 1, ""), (2, 2, "bf16"), (2, 3, "bf16"), (2, 2, "offload"), (2, 3, "offload"),
    (2, 2, "bf16 offload"), (1, 1, "bf16 offload"), (1, 3, "bf16 offload"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "stage", "kind"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
@pytest.mark.slow
def test_a_step_with_nan_is_left_out_on_every_rank(ranks, stage, kind, bad_store, tiny_config, tmp_path):
    """Weights and moments before and after it are the same, the steps after it go on, the scan is named."""
    run = tmp_path / "run"
    more = [f"zero.stage={stage}", "train.micro_batch_volumes=1", "train.num_steps=14", "checkpoint.every_steps=1"]
    more += ["checkpoint.keep_last=100"] + ['train.precision="bf16"'] * ("bf16" in kind)
    more += ["zero.offload_optimizer=true"] * ("offload" in kind)
    run_ranks(*common(tiny_config, bad_store, run), *more, ranks=ranks, logs=tmp_path)
    lines = metrics.read(run / "metrics.jsonl")
    skipped = [step for step in lines if lines[step]["loss"] is None]
    assert 1 <= len(skipped) <= 4 and 14 not in skipped
    for step in skipped:
        found = json.loads((run / "nonfinite" / f"step-{step:08d}.json").read_text())
        assert found["step"] == step and found["suspects"] == [BAD]
        assert [one["sample_index"] for one in found["samples"]] == list(range(4 * step - 4, 4 * step))
        before, after = (files.directory(run / "checkpoints", at) for at in (step - 1, step))
        if step > 1:
            assert equal(before, after)
            states = files.read_state(before), files.read_state(after)
            assert states[0].updates == states[1].updates and states[0].skipped + 1 == states[1].skipped
        assert not equal(after, files.directory(run / "checkpoints", step + 1))
    assert lines[14]["skipped_steps"] == len(skipped)
    text = run_brainscale("replay", run, skipped[-1]).stdout
    assert f"{BAD}   ← not finite" in text and "reproduced: the run left it out too" in text


def equal(one: Path, other: Path) -> bool:
    readers = Reader(one), Reader(other)
    return all(
        readers[0].get(name, moment).equal(readers[1].get(name, moment))
        for name in readers[0].names()
        for moment in (None, "exp_avg", "exp_avg_sq")
    )


@pytest.mark.slow
def test_steps_in_a_row_end_the_run_and_nothing_of_them_is_saved(bad_store, tiny_config, tmp_path):
    """With batches of two epochs every step holds the scan. A larger limit goes on past them."""
    run = tmp_path / "run"
    more = ("train.global_batch_volumes=64", "train.micro_batch_volumes=8", "health.max_skipped_in_a_row=2")
    for _ in range(2):
        ranks = run_ranks(*common(tiny_config, bad_store, run), *more, ranks=2, code=5, logs=tmp_path)
        assert "2 steps in a row were not finite, up to step 2" in ranks[0].text and "Traceback" not in ranks[0].text
        assert json.loads((run / "exit.json").read_text())["code"] == 5
        assert not files.directories(run / "checkpoints")
    assert losses(run) == {1: None, 2: None}
    run_ranks(
        *common(tiny_config, bad_store, run), *more, "health.max_skipped_in_a_row=9", "train.num_steps=5", logs=tmp_path
    )
    assert files.read_state(files.directory(run / "checkpoints", 5)).skipped == 5


def spoil_one_gradient(arguments: list[str], step: int) -> None:
    """Train; on rank 1 the gradient of one tensor is NaN at one step, though every loss is finite."""
    import os

    from brainscale import cli
    from brainscale.mae import Mae

    plain, calls = Mae.forward, [0]

    def forward(self, *given):
        out = plain(self, *given)
        calls[0] += 1
        if os.environ["RANK"] == "1" and calls[0] == step and self.training:
            nothing = self.encoder.embed.bias.sum() * 0
            return out._replace(loss=out.loss + nothing.abs().sqrt())
        return out

    Mae.forward = forward
    cli.main(arguments)


def test_a_gradient_that_is_not_finite_is_enough(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    arguments = [*map(str, common(tiny_config, tiny_store, run)), "checkpoint.every_steps=1", "train.num_steps=8"]
    finish(start_function(partial(spoil_one_gradient, arguments, 5), ranks=2, logs=tmp_path))
    found = json.loads((run / "nonfinite" / "step-00000005.json").read_text())
    assert found["suspects"] == [] and all(isinstance(one["loss"], float) for one in found["samples"])
    assert [step for step, loss in losses(run).items() if loss is None] == [5]
    assert metrics.read(run / "metrics.jsonl")[8]["skipped_steps"] == 1


def test_a_state_that_is_not_finite_is_never_saved(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    run_ranks(*common(tiny_config, tiny_store, run), "train.num_steps=4", logs=tmp_path)
    path = files.directory(run / "checkpoints", 4)
    state, weights, reader = files.read_state(path), files.read_weights(path), Reader(path)
    moments = {f"{name}.{m}": reader.get(name, m) for name in weights for m in ("exp_avg", "exp_avg_sq")}
    moments["encoder.embed.bias.exp_avg"][0] = torch.nan
    with pytest.raises(FloatingPointError, match="1 tensors are not finite"):
        files.write(tmp_path / "other", state, weights, moments)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_replay_of_a_finite_step_agrees_with_the_log(unbroken):
    done = run_brainscale("replay", unbroken, 38)
    assert "from" in done.stdout and "(1 step(s) before it done again)" in done.stdout
    assert "reproduced: the run recorded loss" in done.stdout and "difference of 0.0e+00" in done.stdout


@pytest.mark.slow
def test_replay_says_what_it_cannot_do(unbroken, tmp_path):
    assert "is no run folder" in run_brainscale("replay", tmp_path, 3, code=2).stderr
    assert "got step 41; the run has steps 1 to 40" in run_brainscale("replay", unbroken, 41, code=2).stderr
