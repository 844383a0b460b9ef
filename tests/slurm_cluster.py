"""A real Slurm on one machine, as root and without systemd: munged, slurmctld and several slurmd, all on loopback.

Debian's build has MULTIPLE_SLURMD, so nodes are processes here; they share the host's name, and are told apart by
SLURMD_NODENAME. Everything lies in a folder of its own and goes with it, as do the nodes' names in /etc/hosts.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pytest
from processes import free_ports

ROOT = Path(__file__).parent.parent
NODES = tuple(f"bs-{os.getpid()}-n{number}" for number in (1, 2, 3))
"""Other than those of a cluster that another worker of pytest has up."""
GPUS = 2
HOSTS = Path("/etc/hosts")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")


def why_not() -> str:
    """Why there can be no Slurm here; "" if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no Slurm here ({', '.join(missing)} not found): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root here, and this is another user"


class Cluster:
    """What a test asks of it. Commands run with its configuration; jobs inherit their environment."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(home / "slurm.conf"), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Bring everything up; returns when all nodes are idle."""
        for name in ("state", *NODES):
            (self.home / name).mkdir()
        key = self.home / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        for number in range(GPUS):  # slurmd wants character devices
            os.mknod(self.home / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        ports = free_ports(1 + len(NODES))
        (self.home / "slurm.conf").write_text(configuration(self.home, ports))
        (self.home / "gres.conf").write_text(
            "".join(f"NodeName={node} Name=gpu File={self.home}/gpu[0-{GPUS - 1}]\n" for node in NODES)
        )
        munge = [f"--{name}-file={self.home}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.home}/munge.socket", *munge)
        until(lambda: (self.home / "munge.socket").exists(), "munged", self.logs)
        self._daemon("slurmctld", "-D", "-i", "-c", "-f", str(self.home / "slurm.conf"))
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node's daemon, and wait until it can be given work."""
        self._daemon("slurmd", "-D", "-c", "-N", node, "-f", str(self.home / "slurm.conf"), name=node)
        idle = ("sinfo", "--noheader", "--nodes", node, "--format", "%t")
        until(lambda: self.run(*idle, check=False).split() == ["idle"], f"{node} idle", self.logs)

    def kill_node(self, node: str) -> None:
        """End a node's daemon without warning; its tasks go on, as on a node that lost its network."""
        self.daemons.pop(node).kill()

    def stop(self) -> None:
        """End all daemons and what jobs left behind."""
        self.run("scancel", "--user", "root", check=False)
        until(
            lambda: not self.run("squeue", "--noheader", check=False).strip(), "all jobs to end", self.logs, fail=False
        )
        for daemon in reversed([*self.daemons.values()]):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str | Path, check: bool = True, **environment: str) -> str:
        """What a command prints."""
        done = subprocess.run(
            [*map(str, command)], env={**self.environment, **environment}, cwd=ROOT, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def sbatch(self, script: str, *arguments: str | Path, options: tuple[str, ...] = (), **environment: str) -> str:
        """Submit one of the scripts of slurm/; returns the job's number. Its output: `log`."""
        output = ("--output", f"{self.home}/%j.log", "--parsable", "--cpus-per-task=1")
        return self.run("sbatch", *output, *options, f"slurm/{script}", *arguments, **environment).strip()

    def log(self, job: str) -> str:
        """What a job printed so far, in all its lives."""
        path = self.home / f"{job}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of it."""
        text = self.run("scontrol", "show", "job", "--oneliner", number)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def finish(self, job: str, timeout_s: float = 240) -> dict[str, str]:
        """Wait until a job has ended for good; what Slurm knows of it."""
        until(lambda: self.job(job)["JobState"] in ENDED, f"job {job} to end", lambda: self.log(job), timeout_s)
        return self.job(job)

    def trains(self, run: Path, job: str, life: int, tell: Callable[[], str]) -> None:
        """Wait until a life of a job, counted from 0, has taken steps of its own."""

        def stepped() -> bool:
            starts, lines = lives(run), read(run / "metrics.jsonl").splitlines()
            newest = json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0
            return len(starts) > life and newest > starts[-1]["step"] + 2

        until(stepped, f"life {life} of job {job} to train", tell, 120)

    def tasks(self, *words: str) -> list[int]:
        """Processes of Python in jobs that have all these words in their command."""
        found = []
        for pid in left_behind(self.home):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if command[0] == sys.executable and all(any(word in part for part in command) for word in words):
                found.append(pid)
        return found

    def logs(self) -> str:
        """What the daemons said last."""
        files = sorted(self.home.glob("*.log"))
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def _daemon(self, *command: str, name: str = "") -> None:
        output = (self.home / f"{name or command[0]}.out.log").open("ab")
        self.daemons[name or command[0]] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, "SLURM_CONF": str(self.home / "slurm.conf")},
        )  # fmt: skip


def configuration(home: Path, ports: list[int]) -> str:
    """slurm.conf: no cgroups, no accounting; a job that is queued again starts after seconds, not minutes."""
    host = socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=32000 Gres=gpu:{GPUS}"
        for node, port in zip(NODES, ports[1:])
    )
    return f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_min_age_reserve=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=20
MinJobAge=3600
SlurmdTimeout=15
MessageTimeout=20
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def read(path: Path) -> str:
    """What a file holds; nothing where there is none yet."""
    return path.read_text() if path.is_file() else ""


def lives(run: Path) -> list[dict[str, Any]]:
    """The starts that a run has noted."""
    return [json.loads(line) for line in read(run / "starts.jsonl").splitlines()]


def slow_to_start(path: Path) -> Path:
    """A Python that, the first time it is to train or convert, does not look at signals and takes for ever."""
    path.write_text(
        f'#!/bin/bash\ncase "$*" in *pretrain*|*to_zarr*)\n'
        f"  if [ ! -e {path}.begun ]; then touch {path}.begun; exec sleep 1000; fi;;\nesac\n"
        f'exec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return path


def until(
    condition: Callable[[], object], what: str, tell: Callable[[], str], timeout_s: float = 60, fail: bool = True
) -> None:
    """Wait for a condition; the test fails with what `tell` gives when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            assert not fail, f"waited {timeout_s} s for {what}\n{tell()}"
            return
        time.sleep(0.2)


@contextmanager
def running() -> Iterator[Cluster]:
    """A cluster while the block lasts; skips the test where there can be none."""
    if reason := why_not():
        pytest.skip(reason)
    names = f"127.0.0.1 {' '.join(NODES)}\n"
    edit_hosts(lambda text: text + names)
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        for pid in left_behind(cluster.home):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(cluster.home)
        edit_hosts(lambda text: text.replace(names, ""))


def edit_hosts(change: Callable[[str], str]) -> None:
    """Change /etc/hosts in place (in a container it cannot be replaced), one process at a time."""
    with filelock.FileLock(Path(tempfile.gettempdir()) / "brainscale-hosts.lock"):
        HOSTS.write_text(change(HOSTS.read_text()))


def left_behind(home: Path) -> list[int]:
    """Processes that still use a cluster's configuration."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SLURM_CONF={home}/slurm.conf".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return found
