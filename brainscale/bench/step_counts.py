"""What stands in for a GPU where there is none: bytes and operator calls of training steps and of single blocks,
counted on a CPU, and what the compiler makes of the kernels for sm_90.

Counted as in kernel_bytes.py, with weights in bf16: torch's operators one by one, Triton's kernels load by load in its
interpreter, compiled blocks as Inductor counts them (for a CPU, whose fused kernels are not quite a GPU's). Attention
is one operator that reads its inputs and writes its outputs once, as FlashAttention does; MONAI's writes its scores
out. Steps are counted at two batches, and a straight line through both tells what every volume costs and what a step
costs whatever its batch: the optimizer, clipping, the finite check. Bytes say what memory moves, launches what Python
starts; neither is a time.
"""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from brainscale.bench import step_peers as peers  # first: it tells DeepSpeed about the device
from brainscale.bench.kernel_bytes import Counting, Traffic, generated
from brainscale.bench.kernels import why
from brainscale.bench.record import sample_lines, skipped
from brainscale.bench.step_peers import JEPA, MAE, SPECTRAL, Case, MonaiStep, OurStep, in_world
from brainscale.engine import torch_optimizer
from brainscale_kernels import compile_report

BENCH, OURS, LABEL = "step", "brainscale", "counted on a CPU, not timed"
BATCHES = 1, 2
COUNTED = (MAE, SPECTRAL, JEPA)
"""VCR needs two volumes, and adds nothing that shows; `bench kernels` counts the term of patches."""
SHOWN = 12
"""Operators of a line's `bytes_of`, the rest together."""


def step_lines(case: Case, objectives: tuple[str, ...], interpreted: bool) -> list[dict[str, Any]]:
    """Lines over steps: MONAI's, and ours in plain PyTorch; interpreted: also with kernels, in a process where they are
    interpreted (TRITON_INTERPRET=1)."""
    world = in_world()
    print(f"counting: {case.name}", file=sys.stderr, flush=True)
    given = [next(iter(peers.make_batches(case, batch, 1, world.device))) for batch in BATCHES]
    steps: dict[str, tuple[Any, Sequence[Any]]] = {}
    if not (missing := peers.missing()):
        peer = MonaiStep(case, case.settings(MAE, BATCHES[0]), world, "conv", False)
        steps[peers.EAGER] = peer, [peers.as_floats(one, peer.dtype) for one in given]
    engines: dict[str, Any] = {}
    forms = {"plain PyTorch": "reference", **({"Triton kernels": "triton"} if interpreted else {})}
    counted = [objective for objective in objectives if objective in COUNTED]
    for objective, (form, kernels) in itertools.product(counted, forms.items()):
        config = case.having(f'kernels="{kernels}"', "train.compile=false").settings(objective, BATCHES[0])
        if config.objective not in engines:
            engines[config.objective] = peers.start_engine(config, case.volume_zyx, world)
        steps[f"{objective}, {form}"] = OurStep(engines[config.objective], config, world), given
    of_volume, of_step = dict[str, Traffic](), dict[str, Traffic]()
    for name, (step, batches) in steps.items():
        print(f"counting: {case.name}, {name}", file=sys.stderr, flush=True)
        of_volume[name], of_step[name] = line_through(*(count_step(step, batch) for batch in batches))
    titles = [f"{LABEL}: {case.name}: {what}" for what in ("each volume of a step", "a step, whatever its batch")]
    found = [skipped(BENCH, title, peers.EAGER, missing) for title in titles if missing]
    return found + _lines(titles[0], of_volume) + _lines(titles[1], of_step)


def count_step(step: Any, given: Any) -> Traffic:
    """Of the second of two steps; AdamW is one launch for many tensors, as it is on a GPU."""
    if isinstance(step, OurStep):
        for group in torch_optimizer(step.engine).param_groups:
            group["fused"], group["foreach"] = True, False
    step(given)
    traffic = Traffic()
    mode = Counting(traffic)
    with mode, mode.kernels():
        step(given)
    return traffic


def line_through(smaller: Traffic, larger: Traffic) -> tuple[Traffic, Traffic]:
    """What each volume adds, and what there is without any, of counts at BATCHES. Pure."""
    few, many = BATCHES
    each, rest = Traffic(), Traffic()
    for name in larger.bytes_of.keys() | smaller.bytes_of.keys():
        each.bytes_of[name] = (larger.bytes_of[name] - smaller.bytes_of[name]) // (many - few)
        rest.bytes_of[name] = smaller.bytes_of[name] - few * each.bytes_of[name]
    each.launches = (larger.launches - smaller.launches) // (many - few)
    rest.launches = smaller.launches - few * each.launches
    return each, rest


# ------------------------------------------------------------------------------------------- blocks


def block_lines(case: Case) -> list[dict[str, Any]]:
    """Lines over the forward and backward pass of one block of the encoder and of the decoder, for one volume: ours and
    MONAI's, eager and compiled."""
    world = in_world()
    (given,) = peers.make_batches(case, 1, 1, world.device)
    config = case.having("train.compile=false").settings(MAE, 1)
    step = OurStep(peers.start_engine(config, case.volume_zyx, world), config, world)
    ours = {"encoder": step.model.encoder.trunk.blocks[0], "decoder": step.model.decoder.trunk.blocks[0]}
    blocks = {OURS: (ours, inputs_of(step, given, ours))}
    if not peers.missing():
        peer = MonaiStep(case, config, world, "perceptron", False)
        theirs = {"encoder": peer.network.blocks[0], "decoder": peer.network.decoder_blocks[0]}
        blocks[peers.MONAI] = theirs, inputs_of(peer, peers.as_floats(given, peer.dtype), theirs)
    found = []
    for part in ours:
        tokens, width = blocks[OURS][1][part][0].shape[1:]
        title = f"{LABEL}: a block of the {part}, forward and backward, {tokens} tokens of {width}, bf16"
        print(f"counting: {title}", file=sys.stderr, flush=True)
        traffic: dict[str, Traffic] = {}
        for (name, (modules, inputs)), form in itertools.product(blocks.items(), ("eager", "torch.compile")):
            try:
                traffic[f"{name}, {form}"] = count_block(modules[part], inputs[part], form != "eager")
            except BackendCompilerFailed as error:
                found.append(skipped(BENCH, title, f"{name}, {form}", why(error)))
        found += _lines(title, traffic)
    return found


def inputs_of(step: Any, given: Any, blocks: dict[str, nn.Module]) -> dict[str, tuple[Any, ...]]:
    """What blocks are called with in a step."""
    seen: dict[str, tuple[Any, ...]] = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, arguments, name=name: seen.update({name: arguments}))
        for name, block in blocks.items()
    ]
    step(given)
    for hook in hooks:
        hook.remove()
    return seen


def count_block(block: nn.Module, inputs: tuple[Any, ...], compiled: bool) -> Traffic:
    """Of its forward and backward pass, with gradients to the weights that it uses and to its first input."""
    traffic = Traffic()
    x = inputs[0].detach().requires_grad_()
    cotangent = torch.ones_like(x)
    leaves = [x, *block.parameters()]

    def both() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(run(x, *inputs[1:]), leaves, cotangent, allow_unused=True)

    run: Any = torch.compile(block, dynamic=False, fullgraph=True) if compiled else block
    if compiled:
        with generated(traffic):
            both()
    else:
        both()
    with Counting(traffic):
        both()
    return traffic


# ------------------------------------------------------------------------------------------- kernels


def compiled_lines(arch: str) -> list[dict[str, Any]]:
    """Lines over the registers of every kernel, compiled ahead of time, by `brainscale_kernels.compile_report`."""
    found = []
    for row in compile_report.report(arch):
        title = f"compiled ahead of time for {arch}, not run: {row['name']}"
        (line,) = sample_lines(
            BENCH, title, "registers", {row["kernel"]: [row["registers"]]}, row["kernel"], "compiled"
        )
        spills = row["spill_stores"] + row["spill_loads"]
        widest = max(map(int, row["load_bits"]), default=0)
        line["form"] = (
            f"{row['num_warps']} warps, {row['blocks_per_sm']} blocks an SM, {spills or 'no'} spills, loads of up to "
            f"{widest} bits{', tensor cores' if row['tensor_core'] else ''}"
        )
        line["bytes_of"] = {"stack": row["stack_bytes"], "shared memory": row["shared_bytes"]}
        found.append(line)
    return found


def _lines(title: str, traffic: dict[str, Traffic]) -> list[dict[str, Any]]:
    samples = {name: [float(counted.bytes)] for name, counted in traffic.items()}
    lines = sample_lines(BENCH, title, "B", samples, next(iter(samples)))
    for line in lines:
        counted = traffic[line["variant"]]
        shown = dict(counted.bytes_of.most_common(SHOWN))
        rest = counted.bytes - sum(shown.values())
        line |= {"launches": counted.launches, "bytes_of": shown | ({"others": rest} if rest else {})}
    return lines
