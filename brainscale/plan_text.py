"""A plan in words and as a table, or as JSON."""

import json
from dataclasses import asdict
from typing import Any

from brainscale import plan_time
from brainscale.model_counts import block_count
from brainscale.plan import Plan
from brainscale.plan_memory import CONTEXT_BYTES, GIB, SLACK_FRACTION


def text(plan: Plan) -> str:
    """What an engineer looks at: shape, memory, time, what limits it, what would fit, and what is guessed."""
    return "\n".join([*_shape(plan), "", *_memory(plan), "", *_time(plan), *_notes(plan), "", *_guesses(plan)])


def _shape(plan: Plan) -> list[str]:
    tokens, config = plan.tokens, plan.config
    teacher = f" + {plan.teacher_parameters:,} in the teacher" if plan.teacher_parameters else ""
    network = f", {plan.network.name}" if plan.nodes > 1 else ""
    return [
        f"{plan.nodes} node(s) × {plan.gpus_per_node} {plan.gpu.name}{network}: {config.objective}, "
        f"{config.train.precision}, {plan.micro_batch_volumes} volume(s) × {plan.accumulation} accumulated × "
        f"{plan.ranks} GPUs = {config.train.global_batch_volumes}, ZeRO stage {plan.zero_stage}"
        + (", optimizer offloaded" if config.zero.offload_optimizer else "")
        + (
            f", {plan.recomputed_blocks} of {block_count(config)} blocks computed again"
            if plan.recomputed_blocks
            else ""
        ),
        f"volume      {plan.volume.shape_zyx} voxels z, y, x (from {plan.volume.origin})",
        f"tokens      {tokens.total:,}: {tokens.visible:,} seen, {tokens.masked:,} masked"
        + (f", {tokens.decoded:,} of them decoded" if tokens.decoded < tokens.masked else ""),
        f"parameters  {plan.parameters:,} trained{teacher}",
        f"FLOPs       {plan.flops_per_sample:.3e} a sample, {plan.executed_flops_per_sample:.3e} as executed",
    ]


def _memory(plan: Plan) -> list[str]:
    parts, total, capacity = plan.memory.parts(), plan.memory.total_bytes / GIB, plan.gpu.memory_gib
    verdict = (
        f"fits, {capacity - total:.1f} GiB free" if plan.fits else f"DOES NOT FIT: {total - capacity:.1f} GiB too much"
    )
    lines = [f"memory of a GPU, GiB, at its fullest: {plan.memory.peak_phase}"]
    lines += [f"  {part.name:<24}{part.bytes / GIB:>8.2f}  {part.why}" for part in parts]
    lines += [f"  {'total':<24}{total:>8.2f}  of {capacity:.1f}: {verdict}"]
    others = sorted(plan.memory.phases, key=plan.memory.tensor_bytes, reverse=True)[1:]
    lines += [
        "  tensors at other moments: " + ", ".join(f"{p} {plan.memory.tensor_bytes(p) / GIB:.2f}" for p in others)
    ]
    if plan.memory.host_bytes:
        host = plan.memory.host_bytes * plan.gpus_per_node / GIB
        lines += [f"  host memory of a node for the offloaded optimizer: {host:.1f} GiB"]
    return lines


def _time(plan: Plan) -> list[str]:
    time, config = plan.time, plan.config
    rows = [
        ("computing", time.compute_s, f"{plan.attained:.0%} of the peak of {plan.gpu.name}"),
        ("memory bandwidth", time.memory_s, "optimizer, gradients, spectral term"),
        ("offloading", time.offload_s, "to the host and back, AdamW there"),
        (
            "communication", time.exposed_s,
            f"that is waited for; {time.communication_s:.3f} s in all, {time.sent_bytes / 1e9:.2f} GB a GPU "
            f"at {time.bus_gb_per_s:.1f} GB/s",
        ),
    ]  # fmt: skip
    lines = ["seconds per step"]
    lines += [f"  {name:<24}{value:>8.3f}  {why}" for name, value, why in rows if value or name != "offloading"]
    lines += [f"  {'total':<24}{time.step_s:>8.3f}  limited by {time.limit}; {time.mfu:.0%} MFU"]
    steps, batch = config.train.num_steps, config.train.global_batch_volumes
    epochs = f", {steps * batch / plan.volume.rows:.0f} epochs" if plan.volume.rows else ""
    (low, high), (slow, fast) = plan.hours_range, plan_time.COMPUTE_RANGE
    per_gpu = plan.samples_per_s / plan.ranks
    kept = config.checkpoint.keep_last * plan.checkpoint_bytes / 1e9
    return [
        *lines, "",
        f"samples/s   {plan.samples_per_s:,.0f}",
        f"to the end  {plan.hours:,.1f} h, {plan.gpu_hours:,.0f} GPU-hours ({steps:,} steps of {batch}{epochs})",
        f"            {low:,.1f} to {high:,.1f} h at {fast:.0%} to {slow:.0%} of the peak",
        f"data        {per_gpu:,.1f} volumes/s and {plan.data_bytes_per_s / 1e9:.2f} GB/s a GPU, decoded "
        f"({plan.data_bytes_per_s * plan.gpus_per_node / 1e9:.2f} GB/s a node)",
        f"checkpoint  {plan.checkpoint_bytes / 1e9:.2f} GB each, in rank 0's host memory too; {kept:.1f} GB are kept",
    ]  # fmt: skip


def _notes(plan: Plan) -> list[str]:
    lines = ["", *(f"note: {sentence}" for sentence in plan.warnings)] if plan.warnings else []
    if plan.fits:
        return lines
    lines += ["", "what would fit, the cheapest first:"] if plan.alternatives else ["", "nothing that was tried fits"]
    for one in plan.alternatives:
        asked = [*([f"--nodes {one.nodes}"] if one.nodes != plan.nodes else []), *one.overrides]
        lines += [
            f"  {' '.join(asked)}",
            f"      {one.memory_gib:.1f} GiB, {one.step_s:.3f} s a step, {one.gpu_hours:,.0f} GPU-hours",
        ]
    return lines


def _guesses(plan: Plan) -> list[str]:
    """Which figures are what."""
    network = [f"  {plan.network.name}: {plan.network.source}"] if plan.nodes > 1 else []
    return [
        "Estimates from formulas; nothing here was measured on a GPU.",
        "  counted on a CPU: parameters, FLOPs, bytes sent, states, saved activations (tests/test_plan*.py)",
        f"  guessed: {plan.attained:.0%} of the peak (torchtitan's Llama 8B on H100: 33 to 39 %; give --attained),",
        f"           {plan_time.ATTAINED_MEMORY:.0%} of memory bandwidth, {plan_time.OVERLAP:.0%} overlap, "
        f"{CONTEXT_BYTES / GIB:.0f} GiB of context, {SLACK_FRACTION:.0%} of slack",
        "  left out: train.compile, which saves memory and time",
        f"  {plan.gpu.name}: {plan.gpu.source}",
        *network,
    ]


def as_json(plan: Plan) -> str:
    """The same for machines, units in names; "gpu" and "network" can be given back by --hardware."""
    memory, time = plan.memory, plan.time
    figures: dict[str, Any] = {
        "nodes": plan.nodes, "gpus_per_node": plan.gpus_per_node, "gpu": asdict(plan.gpu),
        "network": asdict(plan.network),
        "volume_zyx": plan.volume.shape_zyx, "volume_origin": plan.volume.origin, "tokens": asdict(plan.tokens),
        "parameters": plan.parameters, "teacher_parameters": plan.teacher_parameters,
        "flops_per_sample": plan.flops_per_sample, "executed_flops_per_sample": plan.executed_flops_per_sample,
        "micro_batch_volumes": plan.micro_batch_volumes, "accumulation": plan.accumulation,
        "zero_stage": plan.zero_stage, "recomputed_blocks": plan.recomputed_blocks,
        "memory": {
            "fits": plan.fits, "total_bytes": memory.total_bytes, "peak_phase": memory.peak_phase,
            "parts": [asdict(part) for part in memory.parts()], "host_bytes_per_gpu": memory.host_bytes,
            "tensor_bytes": {phase: memory.tensor_bytes(phase) for phase in memory.phases},
        },
        "time": {**asdict(time), "step_s": time.step_s, "limited_by": time.limit, "attained_fraction": plan.attained},
        "samples_per_s": plan.samples_per_s, "hours": plan.hours, "hours_range": plan.hours_range,
        "gpu_hours": plan.gpu_hours, "data_bytes_per_s_per_gpu": plan.data_bytes_per_s,
        "checkpoint_bytes": plan.checkpoint_bytes, "warnings": plan.warnings,
        "alternatives": [asdict(one) for one in plan.alternatives], "measured_on_a_gpu": False,
    }  # fmt: skip
    return json.dumps(figures, indent=1)
