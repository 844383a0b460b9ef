"""Real processes of a run without a real start each time: forked from a server that has imported everything.

`run_ranks` gives the same as `brainscale pretrain …` under torchrun, without the page at the end, in a second and not
ten, so that runs can be killed by the dozen. Tests of the launcher itself use `conftest.run_brainscale`.
"""

import faulthandler
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [  # no module of this folder, which the server cannot find: it passes over such a name in silence
        "brainscale.distributed", "brainscale.cli", "brainscale.report", "brainscale.train",
        "torch._dynamo.aot_compile", "torch._dynamo.convert_frame", "deepspeed.runtime.zero.muon.original_muon",
    ]
)  # fmt: skip


@dataclass
class Rank:
    """A process of a run; `text` is what it has written so far to both streams."""

    process: BaseProcess
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 120) -> int:
        """Exit code (negative: the signal that ended it)."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"still running after {timeout_s} s\n{self.text[-3000:]}"
        return self.process.exitcode


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, of those that neither the system hands out by itself (from 32768 on) nor a run in
    Slurm chooses: nobody takes them before they are used, unless another test draws the same."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 20_000), 10_000):
        with socket.socket() as probe:
            found += [port] if probe.connect_ex(("127.0.0.1", port)) else []
        if len(found) == count:
            break
    return found


def start_ranks(*arguments: str | Path, ranks: int = 1, faults: str = "", logs: Path) -> list[Rank]:
    """Start `brainscale ARGUMENTS` as so many ranks; their output goes to files in `logs`."""
    return start_function(partial(_command, [*map(str, arguments)]), ranks=ranks, faults=faults, logs=logs)


def start_function(
    function: Callable[[], None] | Sequence[Callable[[], None]],
    *,
    ranks: int,
    faults: str = "",
    logs: Path,
    each: Sequence[Mapping[str, str]] = (),
) -> list[Rank]:
    """Call a function (of a module's top level, or a partial of one) in so many ranks, or a list's in one rank each;
    each: variables of each rank's environment, besides those that a launcher sets."""
    environment = {"BRAINSCALE_FAULTS": faults, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        (port,) = free_ports(1)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(ranks):
        output = logs / f"{time.monotonic_ns()}-rank-{rank}.log"
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        own |= each[rank] if each else {}
        called = function if callable(function) else function[rank]
        process = SERVER.Process(target=_main, args=(called, {**environment, **own}, output))
        process.start()
        started.append(Rank(process, output))
    return started


def run_ranks(
    *arguments: str | Path, ranks: int = 1, faults: str = "", logs: Path, code: int | None = 0, timeout_s: float = 120
) -> list[Rank]:
    """Start, and wait until all have ended; checks every exit code unless `code` is None."""
    return finish(start_ranks(*arguments, ranks=ranks, faults=faults, logs=logs), code, timeout_s)


def finish(started: list[Rank], code: int | None = 0, timeout_s: float = 120) -> list[Rank]:
    """Wait until all have ended; checks every exit code unless `code` is None. Who has not ended says where it is."""
    try:
        for rank in started:
            rank.process.join(timeout_s)
        late = [rank for rank in started if rank.process.exitcode is None]
        for rank in late:
            rank.signal(signal.SIGABRT)
            rank.process.join(10)
        codes = [rank.process.exitcode for rank in started]
        assert not late, f"not ended after {timeout_s} s: {codes}\n" + "\n".join(rank.text[-6000:] for rank in started)
    finally:
        for rank in started:
            rank.process.kill()
    if code is not None:
        assert codes == [code] * len(started), f"{codes}\n" + "\n".join(rank.text[-3000:] for rank in started)
    return started


def _command(arguments: list[str]) -> None:
    from brainscale import cli

    cli.main(arguments)


def _main(function: Callable[[], None], environment: dict[str, str], output: Path) -> None:
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    faulthandler.enable(file)  # SIGABRT: the stack of every thread
    from brainscale import faults, report, run_folder, stopping

    faults.ARMED[:] = faults.parse(environment["BRAINSCALE_FAULTS"])
    report.write = lambda run_dir: run_dir
    stopping.STARTED_S, run_folder.STARTED_S = time.monotonic(), time.time()
    try:
        function()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
