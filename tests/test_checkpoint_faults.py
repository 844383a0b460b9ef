"""Saving and loading under attack: kills inside a save, full disks, flipped bits, lost pointers, two jobs in a folder.

Every run here is cut and begun again by the same command; what comes out equals a run that nothing befell, bit for bit.
"""

import ast
import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, chosen, losses
from processes import Rank, run_ranks, start_ranks

from brainscale import checkpoint_files as files

STEPS, EVERY = 16, 4
"""Of a run, and between its checkpoints: four saves, of which the newest two are kept."""
DEADLINE_S = 120
TREES = {path.stem: ast.parse(path.read_text()) for path in sorted((ROOT / "brainscale").glob("*.py"))}
NAMES = (files.WEIGHTS, files.OPTIMIZER, files.STATE, files.MANIFEST)

Command = Callable[[Path], tuple[str | Path, ...]]
Whole = Callable[[int], Path]


def points(tree: ast.AST) -> list[str]:
    """Names of the fault points of a save in a piece of source."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [ast.literal_eval(call.args[0]) for call in calls if getattr(call.func, "id", "") == "fault_point"]
    return [name for name in names if name.startswith(("save.", "prune."))]


POINTS = sorted({name for tree in TREES.values() for name in points(tree)})
EVERY_RANK = sorted(
    name
    for node in ast.walk(TREES["checkpoint"])
    if isinstance(node, ast.FunctionDef) and node.name == "save"
    for name in points(node)
)
"""Points that are passed by all ranks; the others are rank 0's, which writes."""
WRITING = [name for name in points(TREES["checkpoint_files"]) if name.startswith("save.") and name != "save.cleared"]
"""Points where a disk may be full. (`save.cleared` is passed only where a checkpoint's place is taken.)"""


@dataclass(frozen=True)
class Kill:
    """Which rank of how many is killed, where, in which save (counted from 1)."""

    ranks: int
    victim: int
    point: str
    save: int

    @property
    def faults(self) -> str:
        if self.point == "save.cleared":
            return f"save.copied:stop@rank=0@hit={self.save};save.cleared:kill@rank=0"
        hit = self.save - 2 if self.point.startswith("prune.") else self.save
        return f"{self.point}:kill@rank={self.victim}@hit={hit}"

    def __str__(self) -> str:
        return f"{self.point}-in-save-{self.save}-rank-{self.victim}-of-{self.ranks}"


KILLS = [
    *(Kill(1, 0, point, save) for point in POINTS for save in (1, 3, 4) if save > 2 or not point.startswith("prune.")),
    *(Kill(2, 0, point, 3) for point in POINTS),
    *(Kill(2, 1, point, save) for point in EVERY_RANK for save in (2, 3, 4)),
]
QUICK_KILLS = [
    Kill(1, 0, "save.weights", 3),
    Kill(1, 0, "save.renamed", 3),
    Kill(1, 0, "prune.renamed", 3),
    Kill(2, 1, "save.copied", 3),
]
FULL_DISKS = [(ranks, point) for point in WRITING for ranks in (1, 2)]
QUICK_FULL_DISKS = [(1, "save.weights")]


@pytest.fixture(scope="module")
def command(tiny_store: Path, tiny_config: Path) -> Command:
    """The command line of a run folder."""
    return lambda run: (
        "pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", f"train.num_steps={STEPS}",
        f"checkpoint.every_steps={EVERY}", "data.holdout_fraction=0",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """By number of ranks: the folder of a run that nothing befell."""
    found: dict[int, Path] = {}

    def of(ranks: int) -> Path:
        if ranks not in found:
            folder = tmp_path_factory.mktemp("whole")
            run_ranks(*command(folder / "run"), ranks=ranks, logs=folder)
            found[ranks] = folder / "run"
            assert list(losses(found[ranks])) == list(range(1, STEPS + 1))
        return found[ranks]

    return of


@pytest.fixture(scope="module")
def cut(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank that was killed when it had checkpoints of steps 8 and 12; to be copied."""
    folder = tmp_path_factory.mktemp("cut")
    run_ranks(*command(folder / "run"), faults="save.begin:kill@hit=4", logs=folder, code=-signal.SIGKILL)
    assert steps_of(folder / "run") == [8, 12]
    return folder / "run"


def steps_of(run: Path) -> list[int]:
    """Steps of a run's checkpoints, each of which must be intact."""
    found = files.directories(run / "checkpoints")
    assert [files.damage(path) for path in found] == [None] * len(found)
    return [files.step_of(path) for path in found]


def began_at(text: str) -> int:
    """The step that a run says it continued from; 0 where it began."""
    found = re.search(r"resumed from \S+ at step (\d+)|already done \((\d+) of", text)
    return int(found[1] or found[2]) if found else 0


def assert_ended_well(run: Path, unbroken: Path) -> None:
    """The run is as one that nothing befell, with nothing left lying about."""
    assert losses(run) == losses(unbroken)
    assert steps_of(run)[-2:] == [STEPS - EVERY, STEPS]
    assert (run / "checkpoints" / files.LATEST).read_text() == f"step-{STEPS:08d}"
    assert not [path.name for path in (run / "checkpoints").iterdir() if ".tmp" in path.name]
    assert json.loads((run / "exit.json").read_text())["code"] == 0


def flip(path: Path, byte: int, bit: int) -> bytes:
    """Flip one bit of a file; returns what it held."""
    before = path.read_bytes()
    data = bytearray(before)
    data[byte] ^= 1 << bit
    path.write_bytes(data)
    return before


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def wait_until_stopped(ranks: list[Rank]) -> None:
    """Return when every process is held by SIGSTOP."""
    deadline = time.monotonic() + DEADLINE_S
    for rank in ranks:
        while Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert rank.process.is_alive() and time.monotonic() < deadline, rank.text[-3000:]
            time.sleep(0.01)


def test_a_save_has_at_least_twelve_points_and_a_kill_is_tried_at_each():
    assert len(POINTS) >= 12 and len(EVERY_RANK) >= 2
    for ranks in (1, 2):
        assert {kill.point for kill in KILLS if (kill.ranks, kill.victim) == (ranks, 0)} == set(POINTS)
    assert {kill.point for kill in KILLS if kill.victim == 1} == set(EVERY_RANK)
    assert set(QUICK_KILLS) <= set(KILLS) and set(QUICK_FULL_DISKS) <= set(FULL_DISKS)


@pytest.mark.parametrize("kill", chosen(QUICK_KILLS, KILLS, 8), ids=str)
def test_a_kill_inside_a_save_costs_one_interval_at_most(kill, command, whole, tmp_path):
    """Whatever is visible after the kill is intact, and the next start continues from the newest of it."""
    run, step = tmp_path / "run", kill.save * EVERY
    started = start_ranks(*command(run), ranks=kill.ranks, faults=kill.faults, logs=tmp_path)
    if kill.point == "save.cleared":  # only where the place is taken: take it behind the run's back
        wait_until_stopped(started[:1])
        files.directory(run / "checkpoints", step).mkdir(parents=True)
        (files.directory(run / "checkpoints", step) / files.MANIFEST).write_text("{}")
        started[0].signal(signal.SIGCONT)
    codes = [rank.wait(DEADLINE_S) for rank in started]
    assert codes[kill.victim] == -signal.SIGKILL, f"{kill.point} was not reached: {codes}\n{started[0].text}"
    assert all(code == 5 for rank, code in enumerate(codes) if rank != kill.victim), codes

    left = steps_of(run)
    newest = max(left, default=0)
    assert newest in (step - EVERY, step)
    assert {newest, newest - EVERY} - {0, -EVERY} <= set(left), "the newest two are there at any moment"
    pointer = run / "checkpoints" / files.LATEST
    assert not pointer.exists() or pointer.read_text() in {f"step-{one:08d}" for one in left}

    again = run_ranks(*command(run), ranks=kill.ranks, logs=tmp_path)
    assert began_at(again[0].text) == newest
    assert_ended_well(run, whole(kill.ranks))


@pytest.mark.slow
def test_rank_1_passes_no_point_of_the_writing(command, whole, tmp_path):
    faults = ";".join(f"{point}:kill@rank=1" for point in POINTS if point not in EVERY_RANK)
    run_ranks(*command(tmp_path / "run"), ranks=2, faults=faults, logs=tmp_path)
    assert_ended_well(tmp_path / "run", whole(2))


@pytest.mark.slow
@pytest.mark.parametrize("point", ["load.swept", "load.found", "load.filled", "save.pointer_written"])
def test_a_kill_while_a_checkpoint_is_loaded_costs_nothing(point, command, whole, tmp_path):
    """Litter to be swept and a pointer to be set right, so that the start has all of it to do."""
    run = tmp_path / "run"
    run_ranks(*command(run), faults="save.weights:kill@hit=3", logs=tmp_path, code=-signal.SIGKILL)
    assert list((run / "checkpoints").glob(".tmp-*"))
    (run / "checkpoints" / files.LATEST).unlink()
    run_ranks(*command(run), faults=f"{point}:kill@hit=1", logs=tmp_path, code=-signal.SIGKILL)
    assert steps_of(run) == [4, 8]
    assert began_at(run_ranks(*command(run), logs=tmp_path)[0].text) == 8
    assert_ended_well(run, whole(1))


@pytest.mark.parametrize(("ranks", "point"), chosen(QUICK_FULL_DISKS, FULL_DISKS, 4))
def test_a_full_disk_ends_the_run_resumably(ranks, point, command, whole, tmp_path):
    run = tmp_path / "run"
    ended = run_ranks(*command(run), ranks=ranks, faults=f"{point}:full@hit=3", logs=tmp_path, code=75)
    assert_says_that_the_disk_is_full(ended, run)
    newest = steps_of(run)[-1]
    assert newest in (8, 12) and newest - EVERY in steps_of(run)
    assert not list((run / "checkpoints").glob(".tmp-*")), "what was begun takes no room"

    again = run_ranks(*command(run), ranks=ranks, logs=tmp_path)
    assert began_at(again[0].text) == newest
    assert_ended_well(run, whole(ranks))


def assert_says_that_the_disk_is_full(ended: list[Rank], run: Path) -> None:
    """One sentence, from rank 0 alone, and the same in exit.json."""
    lines = [line for rank in ended for line in rank.text.splitlines() if "is full" in line]
    assert len(lines) == 1 and lines[0] in ended[0].text
    assert "no older checkpoint was harmed" in lines[0] and "the same command continues" in lines[0]
    assert not [rank.text for rank in ended if "Traceback" in rank.text]
    said = json.loads((run / "exit.json").read_text())
    assert said["code"] == 75 and said["sentence"] == lines[0]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_disk_that_is_really_full_ends_the_run_resumably(ranks, command, whole, small_disk, tmp_path):
    """There is room for two checkpoints and a half; what takes up the rest is removed before the next start."""
    run, filler = small_disk / "run", small_disk / "filler"
    size = sum(len(data) for data in contents(whole(ranks) / "checkpoints" / f"step-{STEPS:08d}").values())
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - int(2.5 * size)))
    ended = run_ranks(*command(run), ranks=ranks, logs=tmp_path, code=75)
    assert_says_that_the_disk_is_full(ended, run)
    assert steps_of(run) == [4, 8]
    assert not list((run / "checkpoints").glob(".tmp-*")), "what was begun takes no room"

    filler.unlink()
    again = run_ranks(*command(run), ranks=ranks, logs=tmp_path)
    assert began_at(again[0].text) == 8
    assert_ended_well(run, whole(ranks))


@pytest.fixture
def copy(whole: Whole, tmp_path: Path) -> Path:
    """A checkpoint directory to spoil."""
    return shutil.copytree(whole(1) / "checkpoints" / f"step-{STEPS:08d}", tmp_path / f"step-{STEPS:08d}")


def test_two_hundred_flipped_bits_are_all_found(copy):
    """Fifty in each file, the same ones every time."""
    random = np.random.default_rng(0)
    missed = []
    for name in NAMES:
        for byte in random.integers((copy / name).stat().st_size, size=50):
            bit = int(random.integers(8))
            before = flip(copy / name, int(byte), bit)
            if files.damage(copy) is None:
                missed.append(f"{name}: bit {bit} of byte {byte}")
            (copy / name).write_bytes(before)
    assert not missed
    assert files.damage(copy) is None


def test_every_byte_of_the_manifest_counts(copy):
    manifest = copy / files.MANIFEST
    for byte in range(manifest.stat().st_size):
        before = flip(manifest, byte, byte % 8)
        assert files.damage(copy) is not None, f"bit {byte % 8} of byte {byte}"
        manifest.write_bytes(before)
    assert files.damage(copy) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_short_grown_swapped_or_gone_is_found(name, copy, whole):
    """Swapped: the whole file of another checkpoint of the same run, of the same size or nearly."""
    file = copy / name
    before = file.read_bytes()
    other = (whole(1) / "checkpoints" / f"step-{STEPS - EVERY:08d}" / name).read_bytes()
    for spoilt in (
        b"",
        before[: len(before) // 2],
        before[:-1],
        before + b"\0",
        before + b"\n",
        bytes(len(before)),
        other,
    ):
        file.write_bytes(spoilt)
        assert files.damage(copy) is not None, spoilt[:20]
    file.unlink()
    assert files.damage(copy) is not None
    file.mkdir()
    assert files.damage(copy) is not None
    file.rmdir()
    file.write_bytes(before)
    assert files.damage(copy) is None


@pytest.mark.parametrize(
    ("ranks", "name"),
    [(1, files.WEIGHTS), *(pytest.param(2, name, marks=pytest.mark.slow) for name in NAMES)],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(ranks, name, command, whole, cut, tmp_path):
    """The bit is found by its hash, the loud line comes once, and the damaged directory is set aside as it is."""
    run = shutil.copytree(cut if ranks == 1 else whole(ranks), tmp_path / "run")
    path = files.directories(run / "checkpoints")[-1]
    flip(path / name, (path / name).stat().st_size // 2, 0)
    spoilt = contents(path)
    again = run_ranks(*command(run), ranks=ranks, logs=tmp_path)
    loud = [line for rank in again for line in rank.text.splitlines() if line.startswith("DAMAGED CHECKPOINT")]
    assert len(loud) == 1 and str(path / name) in loud[0] and f"damaged-{path.name}" in loud[0]
    assert began_at(again[0].text) == files.step_of(path) - EVERY
    assert contents(path.with_name(f"damaged-{path.name}")) == spoilt
    assert_ended_well(run, whole(ranks))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_when_all_checkpoints_are_damaged_nothing_is_touched(ranks, command, cut, tmp_path):
    """Not begun anew in silence: exit 2, one sentence, and every byte of the run stays for whoever can restore it."""
    run = shutil.copytree(cut, tmp_path / "run")
    for path in files.directories(run / "checkpoints"):
        flip(path / files.OPTIMIZER, 1000, 3)
    before = contents(run)
    ended = run_ranks(*command(run), ranks=ranks, logs=tmp_path, code=2)
    said = [line for rank in ended for line in rank.text.splitlines() if line.startswith("error")]
    assert len(said) == 1 and "none of the 2 checkpoints" in said[0] and files.OPTIMIZER in said[0]
    assert not [rank.text for rank in ended if "Traceback" in rank.text]
    after = contents(run)
    assert json.loads(after["exit.json"])["code"] == 2
    assert before.items() <= after.items()


def test_the_pointer_decides_nothing_and_is_set_right(command, whole, cut, tmp_path):
    """An older name, the name of nothing, a flipped bit (which is no text any more), nothing, no file."""
    name = b"step-00000012"
    flipped = bytes([name[0] ^ 0x80]) + name[1:]
    for number, pointer in enumerate((b"step-00000008", b"step-99999999", flipped, b"", None)):
        run = shutil.copytree(cut, tmp_path / f"run-{number}")
        latest = run / "checkpoints" / files.LATEST
        latest.unlink() if pointer is None else latest.write_bytes(pointer)
        run_ranks(*command(run), faults="load.found:kill", logs=tmp_path, code=-signal.SIGKILL)
        assert latest.read_bytes() == name, f"{pointer!r} was not set right"
        assert steps_of(run) == [8, 12]
    again = run_ranks(*command(run), logs=tmp_path)
    assert began_at(again[0].text) == 12
    assert_ended_well(run, whole(1))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_job_is_refused_and_harms_nothing(ranks, command, whole, tmp_path):
    """The first, of two ranks, is held between two steps meanwhile, so that only the second could change a file."""
    run = tmp_path / "run"
    first = start_ranks(*command(run), ranks=2, faults="step.data:stop@hit=10", logs=tmp_path / "first")
    try:
        wait_until_stopped(first)
        before = contents(run)
        second = run_ranks(*command(run), ranks=ranks, logs=tmp_path / "second", code=2, timeout_s=5)
        said = [line for rank in second for line in rank.text.splitlines() if line.startswith("error")]
        assert len(said) == 1 and "is being written by another process" in said[0]
        assert contents(run) == before
        for rank in first:
            rank.signal(signal.SIGCONT)
        assert [rank.wait(DEADLINE_S) for rank in first] == [0, 0], first[0].text
    finally:
        for rank in first:
            rank.process.kill()
    assert_ended_well(run, whole(2))
