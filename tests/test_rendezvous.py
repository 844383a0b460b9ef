"""Ranks that do not meet say why in one sentence, and end with code 2."""

import os
import socket
from functools import partial
from pathlib import Path

import pytest
from conftest import refusal
from processes import Rank, finish, free_ports, start_function


def pretrain(arguments: list[str], device: str = "") -> None:
    """`brainscale pretrain`, which believes to have a device."""
    import dataclasses

    import torch

    from brainscale import cli, distributed

    find = distributed.find
    if device:
        distributed.find = lambda: dataclasses.replace(find(), device=torch.device(device))
    cli.main(arguments)


def start(config: Path, store: Path, run: Path, environments: list[dict[str, str]], **of_rank_1: str) -> list[Rank]:
    """A rank for each environment, which stands in for a launcher's."""
    settings = ("health.first_timeout_s=4", f"data.store={store}", f"run.dir={run}")
    arguments = ["pretrain", str(config), *settings]
    functions = [partial(pretrain, arguments), partial(pretrain, arguments, **of_rank_1)][: len(environments)]
    return start_function(functions, ranks=len(environments), each=environments, logs=run.parent / "logs")


def launcher(port: int, rank: int, size: int = 2, address: str = "127.0.0.1") -> dict[str, str]:
    here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    return {**here, "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def errors(ranks: list[Rank]) -> list[str]:
    texts = [rank.text for rank in ranks]
    assert not any("Traceback" in text for text in texts), texts
    return [line for text in texts for line in text.splitlines() if line.startswith("error")]


def test_a_port_that_is_taken_is_named(tiny_store, tiny_config, tmp_path):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        (rank,) = start(tiny_config, tiny_store, tmp_path / "run", [launcher(port, 0)])
        (said,) = errors(finish([rank], code=2, timeout_s=60))
    assert f"cannot listen on port {port} (" in said and "set MASTER_PORT to a free port" in said
    assert not (tmp_path / "run" / "exit.json").exists()


@pytest.mark.slow
def test_a_stranger_at_the_port_who_says_nothing_is_no_reason_to_wait_for_ever(tiny_store, tiny_config, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (rank,) = start(tiny_config, tiny_store, tmp_path / "run", [launcher(port, 1)])
        (said,) = errors(finish([rank], code=2, timeout_s=60))
    assert f"cannot meet the others at 127.0.0.1:{port} within 4 s: something listens there and does not go on" in said


def test_an_interface_that_is_not_there_is_named(tiny_store, tiny_config, tmp_path):
    (port,) = free_ports(1)
    environments = [launcher(port, rank) | {"GLOO_SOCKET_IFNAME": "none0"} for rank in range(2)]
    said = errors(finish(start(tiny_config, tiny_store, tmp_path / "run", environments), code=2, timeout_s=60))
    assert len(said) == 2  # the second to find out may see no more than that the other has left
    assert any("cannot connect to the other ranks" in one and "none0); open the firewall" in one for one in said)


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named(tiny_store, tiny_config, tmp_path):
    (port,) = free_ports(1)
    (rank,) = start(tiny_config, tiny_store, tmp_path / "run", [launcher(port, 0)])
    (said,) = errors(finish([rank], code=2, timeout_s=60))
    assert f"rank 1 of 2 did not come to 127.0.0.1:{port} within 4 s" in said


@pytest.mark.slow
def test_a_first_rank_that_does_not_come_is_named(tiny_store, tiny_config, tmp_path):
    (port,) = free_ports(1)
    (rank,) = start(tiny_config, tiny_store, tmp_path / "run", [launcher(port, 1)])
    (said,) = errors(finish([rank], code=2, timeout_s=60))
    assert f"cannot meet the others at 127.0.0.1:{port} within 4 s: nothing listens there" in said


def test_an_address_that_no_node_knows_is_named(tiny_store, tiny_config, tmp_path):
    (rank,) = start(tiny_config, tiny_store, tmp_path / "run", [launcher(2345, 1, address="no-such-host.invalid")])
    (said,) = errors(finish([rank], code=2, timeout_s=60))
    assert "cannot resolve MASTER_ADDR = 'no-such-host.invalid'" in said


@pytest.mark.parametrize("port", ["70000", "http"])
def test_a_port_that_is_none_is_refused(port, tiny_store, tiny_config, tmp_path, monkeypatch):
    for name, value in launcher(0, 0, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", port)
    arguments = ("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={tmp_path / 'run'}")
    (rank,) = start_function(partial(pretrain, [*map(str, arguments)]), ranks=1, each=[dict(os.environ)], logs=tmp_path)
    (said,) = errors(finish([rank], code=2, timeout_s=60))
    assert f"MASTER_PORT is '{port}'" in said


def test_a_node_without_its_gpu_is_named_on_every_rank_at_once(tiny_store, tiny_config, tmp_path):
    """Rank 1 believes to have one; the other, without, ends as well, long before NCCL and gloo would notice."""
    (port,) = free_ports(1)
    environments = [launcher(port, rank) for rank in range(2)]
    ranks = start(tiny_config, tiny_store, tmp_path / "run", environments, device="cuda")
    (said,) = errors(finish(ranks, code=2, timeout_s=60))
    assert "no GPU for rank 0 on" in said and "look at nvidia-smi" in said


def test_an_ordinary_mistake_is_still_one_sentence(tiny_config, tmp_path):
    assert "no store given" in refusal(2, "pretrain", tiny_config, f"run.dir={tmp_path / 'run'}")
