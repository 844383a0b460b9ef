"""The README's lines for several machines without Slurm: a torchrun on each. Here both are this machine."""

import json
import re
import shlex
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, losses, run_brainscale
from processes import free_ports
from slurm_cluster import until

pytestmark = pytest.mark.slow


def line_of_the_readme():
    """The words of the torchrun line, with its placeholders."""
    found = re.search(r"^torchrun --nnodes 2 .*?-m brainscale pretrain", (ROOT / "README.md").read_text(), re.M | re.S)
    assert found is not None
    return shlex.split(found[0].replace("\\\n", " "))


def start(tiny_store, tiny_config, run, logs, *changes):
    """Both machines' torchrun, one rank each."""
    (port,) = free_ports(1)
    started = []
    for host in range(2):
        given = {"HOST": "127.0.0.1", "0": str(host), "8": "1", "29500": str(port)}
        words = [given.get(word, word) for word in line_of_the_readme()[1:]]
        command = [sys.executable, "-m", "torch.distributed.run", *words, str(tiny_config)]
        with (logs / f"host-{host}.log").open("w") as file:
            settings = (f"data.store={tiny_store}", f"run.dir={run}", *changes)
            started.append(subprocess.Popen([*command, *settings], cwd=ROOT, stdout=file, stderr=file))
    return started


def test_two_machines_train_as_one_with_two_ranks_does(tiny_store, tiny_config, tmp_path):
    run, plain = tmp_path / "run", tmp_path / "plain"
    hosts = start(tiny_store, tiny_config, run, tmp_path)
    assert [host.wait(120) for host in hosts] == [0, 0], (tmp_path / "host-0.log").read_text()
    run_brainscale("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={plain}", ranks=2)
    assert losses(run) == losses(plain)


def test_a_signal_to_one_machine_saves_on_both(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    hosts = start(tiny_store, tiny_config, run, tmp_path, "train.num_steps=100000")
    until(lambda: losses(run), "a step", lambda: (tmp_path / "host-0.log").read_text())
    hosts[1].send_signal(signal.SIGUSR1)
    for host in hosts:
        host.wait(120)
    record = json.loads((run / "exit.json").read_text())
    assert record["code"] == 75 and "SIGUSR1 after step" in record["sentence"], record
