"""How ranks meet: at a store on MASTER_ADDR:MASTER_PORT, where each says who it is before a process group is made.

Left to itself, torch waits out its timeout and then names neither the ranks that are missing nor what to look at, and
ranks with and without a GPU wait for each other. Under torchrun the agent keeps the store, and holds the port.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta

import torch.distributed as dist

from brainscale import distributed, slurm_job
from brainscale.distributed import World
from brainscale.settings import InputError

PROBE_S = 3.0
"""How long the port is tried, once joining has failed, to say what is wrong with it."""
GRACE_S = 5.0
"""How long rank 0, who may keep the store, waits for the others to have read what is wrong."""
SHOWN = 8
"""Ranks, and nodes, that a sentence lists."""


class NotMet(InputError):
    """The ranks did not meet, so nobody holds the run folder."""


class NotJoined(NotMet):
    """This rank cannot meet the others, who do not know why: each such rank says its own sentence."""


def join(world: World, timeout_s: float) -> None:
    """Collective: make the process group, once all ranks have come and are of one kind.

    Raises NotMet with one sentence for all when ranks are missing after `timeout_s` or some see no GPU, NotJoined when
    this rank cannot reach the place, listen there, or connect to the others.
    """
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise NotJoined(f"MASTER_PORT is {port!r}; give a free port from 1024 to 65535")
    try:
        socket.getaddrinfo(host, int(port))
    except (OSError, UnicodeError) as error:
        raise NotJoined(
            f"rank {world.rank} on {slurm_job.node()} cannot resolve MASTER_ADDR = {host!r} ({_text(error)}); give "
            "the name or address of rank 0's node as every node knows it"
        ) from None
    try:
        store = _open(host, int(port), world, timeout_s)
        verdict = _agree(dist.PrefixStore("rendezvous", store), world, timeout_s) if world.size > 1 else ""
        if not verdict:
            distributed.start(world, timeout_s, store)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise NotJoined(_why(world, host, int(port), timeout_s, error)) from error
    if verdict:
        raise NotMet(verdict)


def _keeps_store(world: World) -> bool:
    return world.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _open(host: str, port: int, world: World, timeout_s: float) -> dist.TCPStore:
    """The store that the ranks meet at. From a thread, which is left behind if need be: torch waits for ever for the
    first word of whatever listens there."""
    opened: Future[dist.TCPStore] = Future()

    def open_store() -> None:
        patience = timedelta(seconds=timeout_s)
        try:
            opened.set_result(
                dist.TCPStore(host, port, is_master=_keeps_store(world), wait_for_workers=False, timeout=patience)
            )
        except RuntimeError as error:
            opened.set_exception(error)

    threading.Thread(target=open_store, name="rendezvous", daemon=True).start()
    try:
        return opened.result(timeout_s + GRACE_S)
    except TimeoutError:
        raise dist.DistNetworkError("no word from it") from None


def _agree(store: dist.Store, world: World, timeout_s: float) -> str:
    """Rank 0 waits for the others and tells all what is wrong, if anything."""
    store.set(f"{world.rank}", f"{world.device.type} {slurm_job.node()}")
    if not world.is_first:
        store.set_timeout(timedelta(seconds=timeout_s + GRACE_S))
        verdict = store.get("verdict").decode()
        store.add("heard", 1)
        return verdict
    begin = time.monotonic()
    missing = list(range(1, world.size))
    while missing and time.monotonic() - begin < timeout_s:
        missing = [rank for rank in missing if not store.check([str(rank)])]
        time.sleep(0.01 if time.monotonic() - begin < 1 else 0.2)
    if missing:
        verdict = (
            f"{named(missing, [])} of {world.size} did not come to {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {timeout_s:.0f} s; look at what they have written, and start as many "
            "processes as WORLD_SIZE says (health.first_timeout_s is how long rank 0 waits)"
        )
    else:
        verdict = _one_kind([store.get(str(rank)).decode() for rank in range(world.size)])
    store.set("verdict", verdict)
    begin = time.monotonic()
    while verdict and store.add("heard", 0) < world.size - 1 - len(missing) and time.monotonic() - begin < GRACE_S:
        time.sleep(0.01)
    return verdict


def _one_kind(cards: list[str]) -> str:
    """A sentence when some ranks have a GPU and others none; cards: "DEVICE HOST" by rank."""
    devices, hosts = zip(*(card.split(" ", 1) for card in cards))
    without = [rank for rank, device in enumerate(devices) if device == "cpu"]
    if len(without) in (0, len(cards)):
        return ""
    return (
        f"no GPU for {named(without, list(hosts))}, while the other ranks have theirs; look at nvidia-smi and "
        "CUDA_VISIBLE_DEVICES there, leave such a node out, or hide the GPUs from all"
    )


def named(ranks: list[int], nodes: list[str]) -> str:
    """Some ranks and the nodes that they are on, in words; nodes: of each rank, or none where they are not known."""
    places = sorted({nodes[rank] for rank in ranks}) if nodes else []
    where = f" on {_listed(places)}" if places else ""
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {_listed(ranks)}{where}"


def _listed(things: Sequence[object]) -> str:
    return ", ".join(map(str, things[:SHOWN])) + (f", … ({len(things)} in all)" if len(things) > SHOWN else "")


def _why(world: World, host: str, port: int, timeout_s: float, error: RuntimeError) -> str:
    """What went wrong, told from the error and from how the port answers now."""
    who, place = f"rank {world.rank} of {world.size} on {slurm_job.node()}", f"{host}:{port}"
    if not isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return (
            f"{who} came to {place}, but cannot connect to the other ranks ({_text(error)}); open the firewall between "
            "the nodes for all ports, and set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that joins "
            "them (see ip -br addr)"
        )
    if _keeps_store(world) and (problem := _taken(port)):
        return (
            f"{who} cannot listen on port {port} ({problem}); set MASTER_PORT to a free port on every rank, or end the "
            "process that holds it (see ss -ltnp)"
        )
    try:
        socket.create_connection((host, port), PROBE_S).close()
    except ConnectionRefusedError:
        found = "nothing listens there: rank 0 has not started, has ended, or runs on another node; look at its output"
    except OSError as closed:
        found = f"no answer ({_text(closed)}): open the firewall for this port"
    else:
        found = f"something listens there and does not go on ({_text(error)}): look at rank 0's output"
    return (
        f"{who} cannot meet the others at {place} within {timeout_s:.0f} s: {found}, and check that MASTER_ADDR and "
        "MASTER_PORT are those of rank 0 on an interface that this node reaches (GLOO_SOCKET_IFNAME, "
        "NCCL_SOCKET_IFNAME)"
    )


def _taken(port: int) -> str:
    """Why this process cannot listen on a port of this host; "" if it can."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        return _text(error)
    return ""


def _text(error: BaseException) -> str:
    """An error on one line; of torch's, without the stack behind it."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return re.sub(r"\s+", " ", text.partition("\nException raised from")[0]).strip()[:300]
