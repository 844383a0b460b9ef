"""GPUs and networks by name: data sheets and published measurements, none of them measured here. For `plan` by names
of ours, for MFU by the names that drivers give (`peak_flops`).

GB/s are 1e9 bytes a second, Gbit/s 1e9 bits. Rates of GPUs are dense (without sparsity). Capacities are those of
nvidia-smi (https://github.com/modal-labs/modal-client/pull/2797, where it has them). `link_gb_per_s` is the bus
bandwidth of a large collective within a node, as nccl-tests reports it
(https://docs.alayanew.com/en/docs/tech-blog/2026-05-06-nccl-tests: A100 SXM4 230-250, H100 PCIe 35-45, H100 SXM5
460-480 with sums in the switch, which are not counted on).
"""

import json
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from brainscale.settings import InputError


@dataclass(frozen=True)
class Gpu:
    """bf16_tflops: 0 where its tensor cores have no bf16; host_gb_per_s: to the host's memory, one way."""

    name: str
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float
    host_gb_per_s: float
    source: str


@dataclass(frozen=True)
class Network:
    """Between nodes. nics_per_node: 0 for one per GPU; attainable_fraction: of the wire, by a large collective."""

    name: str
    nic_gbit_per_s: float
    nics_per_node: int
    attainable_fraction: float
    source: str

    def node_gb_per_s(self, gpus_per_node: int) -> float:
        """What a node sends at once."""
        return self.attainable_fraction * self.nic_gbit_per_s / 8 * (self.nics_per_node or gpus_per_node)


RING = "80 % of NVLink one way, a guess"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-sxm", 79.6, 989, 67, 3350, 360, 55, f"NVIDIA H100 data sheet (SXM5); link: {RING}"),
        Gpu("h100-pcie", 79.6, 756, 51, 2000, 40, 55, "NVIDIA H100 data sheet (PCIe); link: measured elsewhere"),
        Gpu("h200", 140.4, 989, 67, 4800, 360, 55, f"NVIDIA H200 data sheet (SXM, 141 GB); link: {RING}"),
        Gpu("a100-40", 40.0, 312, 19.5, 1555, 240, 25, "NVIDIA A100 data sheet (SXM4 40 GB); link: measured elsewhere"),
        Gpu("a100-80", 80.0, 312, 19.5, 2039, 240, 25, "NVIDIA A100 data sheet (SXM4 80 GB); link: measured elsewhere"),
        Gpu("l40s", 45.0, 362, 91.6, 864, 20, 25, "NVIDIA L40S data sheet; link: half of H100 PCIe's, a guess"),
        Gpu("b200", 179.0, 2250, 80, 8000, 720, 55, f"NVIDIA HGX B200 data sheet (1,000 W); link: {RING}"),
        Gpu("v100", 31.7, 0, 15.7, 900, 120, 12, f"NVIDIA V100 data sheet (SXM2 32 GB); link: {RING}"),
    )
}
WIRE = "the name's line rate"
NETWORKS = {
    network.name: network
    for network in (
        Network("ib-ndr400", 400, 0, 0.9, f"{WIRE}, one port per GPU as in NVIDIA DGX H100; 90 %, a guess"),
        Network("ib-hdr200", 200, 0, 0.9, f"{WIRE}, one port per GPU as in NVIDIA DGX A100; 90 %, a guess"),
        Network("ib-hdr100", 100, 1, 0.9, f"{WIRE}, one port per node; 90 %, a guess"),
        Network("roce-400", 400, 0, 0.7, f"{WIRE}, one port per GPU; 70 %: 35 of 50 GB/s at kubernetes.recipes"),
        Network("roce-100", 100, 1, 0.7, f"{WIRE}, one port per node; 70 % as roce-400"),
        Network("ethernet-100", 100, 1, 0.5, f"{WIRE}, one port per node; 50 % over TCP, a guess"),
        Network("ethernet-25", 25, 1, 0.7, f"{WIRE}, one port per node; 70 % over TCP, a guess"),
        Network("ethernet-10", 10, 1, 0.8, f"{WIRE}, one port per node; 80 % over TCP, a guess"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """Dense TFLOP/s of a device: bf16 matrices (0: it has none) and fp32 outside tensor cores."""

    bf16_tflops: float
    fp32_tflops: float
    source: str


def _as_planned(name: str) -> Peak:
    return Peak(GPUS[name].bf16_tflops, GPUS[name].fp32_tflops, GPUS[name].source)


PEAKS = {
    "NVIDIA H200": Peak(788, 67, "bf16: matrices measured on one H200 at 788 TFLOP/s (its data sheet says 989)"),
    "NVIDIA H100 80GB HBM3": _as_planned("h100-sxm"),
    "NVIDIA H100 PCIe": _as_planned("h100-pcie"),
    "NVIDIA H100 NVL": Peak(835, 60, "NVIDIA H100 NVL data sheet (1,671 with sparsity)"),
    "NVIDIA GH200 480GB": Peak(989, 67, "NVIDIA GH200 data sheet (1,979 with sparsity)"),
    "NVIDIA B200": _as_planned("b200"),
    "NVIDIA A100-SXM4-40GB": _as_planned("a100-40"),
    "NVIDIA A100-PCIE-40GB": _as_planned("a100-40"),
    "NVIDIA A100-SXM4-80GB": _as_planned("a100-80"),
    "NVIDIA A100 80GB PCIe": _as_planned("a100-80"),
    "NVIDIA L40S": _as_planned("l40s"),
    "NVIDIA L40": Peak(181, 90.5, "NVIDIA L40 data sheet"),
    "NVIDIA L4": Peak(121, 30.3, "NVIDIA L4 data sheet (242 with sparsity)"),
    "NVIDIA A40": Peak(149.7, 37.4, "NVIDIA A40 data sheet"),
    "NVIDIA A30": Peak(165, 10.3, "NVIDIA A30 data sheet"),
    "NVIDIA A10": Peak(125, 31.2, "NVIDIA A10 data sheet"),
    "Tesla V100-SXM2-16GB": _as_planned("v100"),
    "Tesla V100-SXM2-32GB": _as_planned("v100"),
}
"""By the name that `torch.cuda.get_device_name` gives, which must be the whole of it: a slice of a GPU (MIG) has the
GPU's name with something behind it, and a part of its rate."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that MFU is a share of, for matrices in `train.precision` ("bf16" or "fp32"); None for a device that is
    not in PEAKS or cannot compute in it. fp32 is full fp32, outside tensor cores: TF32 is off (engine.py)."""
    peak = PEAKS.get(device_name)
    tflops = 0.0 if peak is None else peak.bf16_tflops if precision == "bf16" else peak.fp32_tflops
    return 1e12 * tflops or None


H = TypeVar("H", Gpu, Network)


def find(kind: str, name: str, presets: dict[str, H], measured: dict[str, Any]) -> H:
    """A preset by name with measured figures (None: not given) in place of its own. Raises InputError for a name that
    is none, and for a figure that is not positive."""
    if name not in presets:
        raise InputError(
            f"--{kind} {name} is not known; give one of {', '.join(presets)}, and measured figures beside it"
        )
    given = {key: value for key, value in measured.items() if value is not None}
    for key, value in given.items():
        if not value > 0:
            raise InputError(f"--{key.replace('_', '-')} is {value}; give a positive number")
    source = presets[name].source + (f"; given: {', '.join(given)}" if given else "")
    return replace(presets[name], **given, source=source)


def read(path: Path) -> tuple[Gpu | None, Network | None]:
    """A file of figures, JSON or TOML: {"gpu": {…}, "network": {…}}, either of them, with all keys of the class, as
    `plan --json` prints them. Raises InputError for a file that is none, keys that are missing or not known, and
    figures that are not numbers."""
    try:
        text = path.read_text(encoding="utf-8")
        tree: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is neither JSON nor TOML ({error}); write what `plan --json` prints") from None
    return (
        _made(path, "gpu", tree["gpu"], Gpu) if "gpu" in tree else None,
        _made(path, "network", tree["network"], Network) if "network" in tree else None,
    )


def _made(path: Path, group: str, figures: dict[str, Any], kind: type[H]) -> H:
    wanted = {field.name: field.type for field in fields(kind)}
    if different := sorted(wanted.keys() ^ figures.keys()):
        raise InputError(f"{path}, {group}: {', '.join(different)} is missing or not known; give {', '.join(wanted)}")
    for key, type_ in wanted.items():
        value = figures[key]
        right = isinstance(value, str) if type_ is str else isinstance(value, int | float) and value >= 0
        if not right:
            raise InputError(f"{path}, {group}.{key} is {value!r}; give a {'text' if type_ is str else 'number'}")
    return kind(**figures)
