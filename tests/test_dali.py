"""The DALI loader makes the batches of its plain twin, goes on where it stopped, and leaves nothing behind."""

import gc
import os
import threading
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import FULL, losses, write_tiny_store
from loading import AUGMENTED, CPU, NO_DALI, NO_GPU, make_loader, take
from processes import finish, run_ranks, start_function

from brainscale.dali_loader import choose_loader
from brainscale.prep_plan import Plan
from brainscale.settings import InputError
from brainscale_data_prep.convert import convert
from brainscale_data_prep.phantom import make

dali = pytest.mark.skipif(bool(NO_DALI), reason=NO_DALI)
pytestmark = pytest.mark.slow
GPU = torch.device("cuda", 0)


def anisotropic(record):
    """Voxels of 1 × 1.5 × 3 mm (x, y, z), and a background whose code is not zero."""
    record["affine_stored"] = np.diag([1.0, 1.5, 3.0, 1.0]).reshape(-1).tolist()
    record["background_code"] = -40


def backwards(record):
    """Values that fall where codes rise."""
    record["scale"] = -1.0
    record["clip_low"], record["clip_high"] = -record["clip_high"], -record["clip_low"]


PLANS = {
    "int16": (Plan(grid_voxels_xyz=(16, 24, 16), shard_volumes=4), None),
    "int16, anisotropic": (
        Plan(grid_voxels_xyz=(16, 24, 16), shard_volumes=4, spacing_mm_xyz="native"),
        anisotropic,
    ),
    "int16, backwards": (Plan(grid_voxels_xyz=(16, 24, 16), shard_volumes=4), backwards),
    "uint8": (Plan(grid_voxels_xyz=(16, 24, 16), shard_volumes=4, dtype="uint8"), None),
    "float32": (Plan(grid_voxels_xyz=(16, 24, 16), shard_volumes=4, dtype="float32"), None),
}


def differences(store, device, *overrides, draws=200):
    """(draw, differences of its voxels) for each of so many draws; all else must be the same."""
    here, there = make_loader("torch", store, *overrides), make_loader("dali", store, *overrides, device=device)
    found = []
    for plain, fast in zip(take(here, draws // 4)[0], take(there, draws // 4)[0]):
        fast = fast.to(CPU)
        assert fast.volumes.dtype == plain.volumes.dtype and fast.volumes.shape == plain.volumes.shape
        assert plain.row.tolist() == fast.row.tolist() and plain.sample_index.tolist() == fast.sample_index.tolist()
        for name in ("scale", "offset", "low", "high", "foreground"):
            assert torch.equal(getattr(plain, name), getattr(fast, name))
        apart = (plain.volumes.double() - fast.volumes.double()).abs()
        found += [(here.draw(int(index)), d.flatten()) for index, d in zip(plain.sample_index, apart)]
    return found


def agree(store, device):
    """Cut, padded and mirrored samples are the same, others differ by one storage unit at most: of values of 0..1100,
    also in float32. Both interpolated and altered: all but 1 in 5,000 voxels do, at the edge of the background, where a
    hair decides whether a voxel is background alone, which is not altered."""
    for crop in ("[16,24,16]", "[24,8,16]"):  # the whole volume; cut along y and padded along z
        found = differences(store, device, *AUGMENTED, f"data.crop_voxels_zyx={crop}")
        kinds = {(moves, alters): [] for moves in (False, True) for alters in (False, True)}
        for d, apart in found:
            kinds[d.change.moves, d.change.alters].append(apart)
        kinds = {kind: torch.cat(apart) for kind, apart in kinds.items()}
        assert len(found) == 200 and sum(d.flip for d, _ in found) > 50
        assert kinds[False, False].max() == 0
        assert kinds[True, False].max() <= 1 and kinds[False, True].max() <= 1
        assert (kinds[True, True] > 1).double().mean() <= 1 / 5000


@dali
@pytest.mark.parametrize("name", PLANS)
def test_batches_are_those_of_the_plain_loader(name, tmp_path):
    plan, change = PLANS[name]
    agree(write_tiny_store(tmp_path / "store", plan=plan, change=change), CPU)


@dali
@pytest.mark.gpu
@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@pytest.mark.parametrize("name", PLANS)
def test_batches_of_the_gpu_are_those_of_the_plain_loader(name, tmp_path):
    plan, change = PLANS[name]
    agree(write_tiny_store(tmp_path / "store", plan=plan, change=change), GPU)


@pytest.mark.gpu
@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=dali)])
def test_batches_on_the_gpu_are_whole_while_the_step_before_still_runs(kind, tiny_store):
    """A copy that overtakes, or is written over, shows as other voxels."""
    loader, plain = make_loader(kind, tiny_store, device=GPU), make_loader("torch", tiny_store)
    work = torch.randn(2048, 2048, device=GPU)
    batches = loader.batches(0)
    for expected in take(plain, 40)[0]:
        batch, _ = next(batches)
        assert batch.volumes.device == GPU
        for _ in range(10):
            work = work @ work / 2048
        assert torch.equal(batch.volumes.cpu(), expected.volumes)
    batches.close()


@pytest.mark.parametrize("name", ["affine", "gamma", "gain", "bias", "noise", "blur"])
@dali
def test_each_change_alone(name, tiny_store):
    found = differences(tiny_store, CPU, f"augment.{name}_fraction=1.0", draws=40)
    assert max(float(apart.max()) for _, apart in found) <= 1


@dali
def test_a_cursor_gives_the_tail_also_on_other_ranks(tiny_store):
    """Ten batches of one rank; and six of them, then the rest on two ranks with other numbers of processes."""
    whole, _ = take(make_loader("dali", tiny_store, *AUGMENTED), 10)
    first, cursor = take(make_loader("dali", tiny_store, *AUGMENTED, "data.workers=1"), 6)
    assert cursor == 24
    volumes = {int(i): v for batch in whole for i, v in zip(batch.sample_index, batch.volumes)}
    seen = [int(i) for batch in first for i in batch.sample_index]
    for batch in first:
        assert all(torch.equal(volumes[int(i)], v) for i, v in zip(batch.sample_index, batch.volumes))
    for rank in range(2):
        rest, _ = take(make_loader("dali", tiny_store, *AUGMENTED, rank=rank, ranks=2, micro=2), 4, cursor)
        for batch in rest:
            assert all(torch.equal(volumes[int(i)], v) for i, v in zip(batch.sample_index, batch.volumes))
            seen += [int(i) for i in batch.sample_index]
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=dali)])
def test_nothing_is_left_behind(kind, tiny_store):
    """No process, thread, open file or shared memory, after several loaders."""
    me = psutil.Process()

    def held():
        gc.collect()
        threads = {t.name for t in threading.enumerate() if t.name.startswith(("feed", "loader", "workers"))}
        shared = [m.path for m in me.memory_maps() if m.path.startswith("/dev/shm")]
        children = [c for c in me.children() if "spawn_main" in " ".join(c.cmdline())]
        return threads, shared, children, me.num_fds()

    take(make_loader(kind, tiny_store, *AUGMENTED), 3)
    threads, _, _, files = held()
    for _ in range(2):
        take(make_loader(kind, tiny_store, *AUGMENTED), 3)
    after = held()
    assert after[0] <= threads and after[1] == [] and after[2] == [] and after[3] <= files + 1


def memory_of_a_long_run(kind: str, store: Path, batches: int, out: Path) -> None:
    """Write the resident memory (bytes, of this process and those that it started together) along many epochs."""
    me, loader = psutil.Process(), make_loader(kind, store, *AUGMENTED)
    stream, seen = loader.batches(0), []
    for number in range(batches):
        next(stream)
        if number % (batches // 50) == 0:
            seen.append(sum(p.memory_info().rss for p in [me, *me.children()]))
    stream.close()
    np.save(out, np.array(seen))


@pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=dali)])
def test_memory_stays_flat(kind, tiny_store, tmp_path):
    """5,000 batches (full; else 1,000), which are 2,000 epochs: within 3 % of where it was after a fifth of them."""
    batches = 5000 if FULL else 1000
    run = partial(memory_of_a_long_run, kind, tiny_store, batches, tmp_path / "memory.npy")
    finish(start_function(run, ranks=1, logs=tmp_path), timeout_s=500)
    seen = np.load(tmp_path / "memory.npy")
    settled = np.median(seen[8:14])
    assert np.abs(seen[10:] / settled - 1).max() <= 0.03, (seen / 1e6).round().tolist()


@dali
def test_training_on_phantoms_through_either_loader_gives_the_same_losses(tiny_config, tmp_path):
    make(tmp_path / "phantoms", 6, seed=0, spacing_mm=4.0)
    convert(
        tmp_path / "phantoms", tmp_path / "store",
        Plan(grid_voxels_xyz=(48, 56, 48), spacing_mm_xyz=(4.0, 4.0, 4.0)), workers=1,
    )  # fmt: skip
    for kind in ("torch", "dali"):
        run_ranks(
            "pretrain", tiny_config, f"data.store={tmp_path / 'store'}", f"run.dir={tmp_path / kind}",
            f"data.loader={kind}", *AUGMENTED, "health.probe_every_steps=20", logs=tmp_path,
        )  # fmt: skip
    here, there = losses(tmp_path / "torch"), losses(tmp_path / "dali")
    assert list(here) == list(there) == list(range(1, 41))
    assert np.allclose(list(here.values()), list(there.values()), rtol=1e-4, atol=0)


@dali
def test_a_run_goes_on_with_the_other_loader(tiny_store, tiny_config, tmp_path):
    """Killed under DALI on one rank, continued by threads on two: the losses of an unbroken run."""
    arguments = ("pretrain", tiny_config, f"data.store={tiny_store}", *AUGMENTED)
    run_ranks(*arguments, f"run.dir={tmp_path / 'unbroken'}", "data.loader=torch", logs=tmp_path)
    run = f"run.dir={tmp_path / 'broken'}"
    run_ranks(*arguments, run, "data.loader=dali", faults="step.backward:kill@hit=23", logs=tmp_path, code=-9)
    run_ranks(*arguments, run, "data.loader=torch", ranks=2, logs=tmp_path)
    here, there = losses(tmp_path / "unbroken"), losses(tmp_path / "broken")
    assert list(here) == list(there) == list(range(1, 41))
    assert np.allclose(list(here.values()), list(there.values()), rtol=1e-3, atol=0)


def test_auto_says_what_it_took_and_why():
    kind, why = choose_loader("auto", CPU)
    assert kind.__name__ == "Loader" and ("no GPU" in why or "not installed" in why)
    assert choose_loader("torch", GPU)[0].__name__ == "Loader"
    if NO_DALI:
        with pytest.raises(InputError, match="not installed"):
            choose_loader("dali", CPU)
        assert "not installed" in choose_loader("auto", GPU)[1]
    else:
        assert choose_loader("dali", CPU)[0].__name__ == choose_loader("auto", GPU)[0].__name__ == "DaliLoader"


@pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=dali)])
def test_memory_that_is_too_small_is_refused(kind, tmp_path):
    store = write_tiny_store(tmp_path / "store")
    with pytest.raises(InputError, match=r"data\.prefetch_mb = 1 holds \d+ of the \d batches"):
        next(make_loader(kind, store, "data.prefetch_mb=1", micro=64).batches(0))
    assert os.path.exists(store)
