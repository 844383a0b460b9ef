"""What `plan`'s formulas say of a step on several ranks of one host, beside what `bench scaling` measures."""

from typing import NamedTuple

from brainscale import plan_time
from brainscale.config import Config
from brainscale.hardware import GPUS, NETWORKS, Gpu
from brainscale.model_counts import Tokens

PRESETS = {
    "NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100-sxm", "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100-80", "NVIDIA L40S": "l40s",
    "NVIDIA B200": "b200", "Tesla V100-SXM2-32GB": "v100",
}  # fmt: skip
"""By the name that CUDA gives: `plan`'s preset, whose link is that of the form that is sold under this name."""


class Link(NamedTuple):
    """What was measured of collectives: bus bandwidth as nccl-tests defines it, and the time of one that is empty."""

    bus_gb_per_s: float
    latency_s: float


class Prediction(NamedTuple):
    """Seconds of a step; those of them that wait for communication; and seconds of a step if nothing overlapped."""

    step_s: float
    exposed_s: float
    no_overlap_s: float


def bus_gb_per_s(ranks: int, size_bytes: float, seconds: float) -> float:
    """Of an all-reduce: 2·(n−1)/n of its bytes cross every link (nccl-tests, doc/PERFORMANCE.md)."""
    return 2 * (ranks - 1) / ranks * size_bytes / seconds / 1e9


def on_link(config: Config, ranks: int, compute_s: float, link: Link) -> Prediction:
    """From measured computing and a measured link, by `plan`'s bytes, collectives and overlap. Pure."""
    sent, messages = plan_time.sent_bytes(config, ranks), plan_time.message_count(config, ranks)
    gradients_s, weights_s = (
        sent[kind] / (1e9 * link.bus_gb_per_s) + messages[kind] * link.latency_s for kind in ("gradients", "weights")
    )
    exposed_s = plan_time.exposed(config, ranks, compute_s, gradients_s, weights_s)
    return Prediction(compute_s + exposed_s, exposed_s, compute_s + gradients_s + weights_s)


def preset(device_name: str) -> Gpu | None:
    """`plan`'s preset of a GPU; None where there is none."""
    return GPUS.get(PRESETS.get(device_name, ""))


def planned(config: Config, tokens: Tokens, ranks: int, gpu: Gpu) -> Prediction:
    """`plan`'s own on GPUs of one host. Pure."""
    time = plan_time.predict(config, tokens, 1, ranks, gpu, NETWORKS["ib-ndr400"])  # the network is not used
    return Prediction(time.step_s, time.exposed_s, time.step_s - time.exposed_s + time.communication_s)
