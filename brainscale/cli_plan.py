"""The command `plan`."""

from pathlib import Path

from brainscale.config import Config
from brainscale.settings import InputError, load


def plan(
    config: Path,
    /,
    *overrides: str,
    nodes: int = 1,
    gpus_per_node: int = 8,
    gpu: str = "h100-sxm",
    network: str = "ib-ndr400",
    hardware: Path | None = None,
    gpu_memory_gib: float | None = None,
    gpu_tflops: float | None = None,
    link_gb_per_s: float | None = None,
    network_gbps: float | None = None,
    nics_per_node: int | None = None,
    attained: float | None = None,
    attention: str = "fused",
    json: bool = False,
) -> None:
    """Predict memory per GPU, time and cost of a run before it is started, and what would fit if it does not.

    Formulas alone: nothing is run, no GPU is needed, and the text says which figures are guesses.

    Example: brainscale plan configs/mae_spectral_vit_b.toml --nodes 2 --gpus-per-node 8 --gpu h200 --network ib-ndr400

    Example: brainscale plan configs/paper/mae.toml --gpu a100-80 zero.stage=2 train.micro_batch_volumes=5 --json

    Example: brainscale plan configs/mae_vit_l.toml --gpu h100-sxm --gpu-tflops 700 --attained 0.5 --network-gbps 200

    Parameters
    ----------
    config
        Settings of the run (TOML).
    overrides
        Settings as key=value.
    nodes
        Machines.
    gpus_per_node
        GPUs of each, one rank a GPU.
    gpu
        h100-sxm, h100-pcie, h200, a100-40, a100-80, l40s, b200, v100.
    network
        Between nodes: ib-ndr400, ib-hdr200, ib-hdr100, roce-400, roce-100, ethernet-100, ethernet-25, ethernet-10.
    hardware
        JSON or TOML file with figures of your own: {"gpu": {…}, "network": {…}}, keys as --json prints them.
    gpu_memory_gib
        Memory of a GPU, in place of the preset's.
    gpu_tflops
        Dense rate of matrices in the run's precision, in place of the preset's.
    link_gb_per_s
        Bus bandwidth of a collective within a node, as nccl-tests and `brainscale bench scaling` (MB/s bus) report it.
    network_gbps
        Line rate of a network port, Gbit/s.
    nics_per_node
        Network ports of a node.
    attained
        Share of the GPU's peak that computing attains, 0..1 (default: a guess of 0.40).
    attention
        "fused" (FlashAttention, cuDNN, memory-efficient), or "math", which keeps all scores.
    json
        Print JSON.
    """
    from brainscale import hardware as known
    from brainscale import plan as planning
    from brainscale import plan_text, plan_time

    if attention not in ("fused", "math"):
        raise InputError(f'--attention is {attention!r}; give "fused" or "math"')
    settings = load(Config, config, overrides)
    own_gpu, own_network = known.read(hardware) if hardware is not None else (None, None)
    gpus = known.GPUS if own_gpu is None else {own_gpu.name: own_gpu}
    networks = known.NETWORKS if own_network is None else {own_network.name: own_network}
    rate = "bf16_tflops" if settings.train.precision == "bf16" else "fp32_tflops"
    device = known.find(
        "gpu", gpu if own_gpu is None else own_gpu.name, gpus,
        {"memory_gib": gpu_memory_gib, rate: gpu_tflops, "link_gb_per_s": link_gb_per_s},
    )  # fmt: skip
    wires = known.find(
        "network", network if own_network is None else own_network.name, networks,
        {"nic_gbit_per_s": network_gbps, "nics_per_node": nics_per_node},
    )  # fmt: skip
    made = planning.make(
        settings, planning.volume_of(settings), nodes, gpus_per_node, device, wires,
        plan_time.ATTAINED_COMPUTE if attained is None else attained, attention == "fused",
    )  # fmt: skip
    print(plan_text.as_json(made) if json else plan_text.text(made))
