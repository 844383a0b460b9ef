"""What the compiler makes of every kernel, ahead of time and without a GPU: registers, spills, shared memory, widths of
loads and stores, tensor-core instructions.

    python -m brainscale_kernels.compile_report --arch sm_90 --json report.jsonl

Each variant below calls an operator as a run would. Its launches are recorded in place of being run and compiled down
the path of a real launch, with Triton's own rules for types, alignment and constants. Instructions are counted in the
machine code (SASS), each once however often it is executed. tests/test_compile_report.py holds the figures of sm_90.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from brainscale_kernels.launch import Launch, launch, recording
from brainscale_kernels.patch_gather import Stored, patch_gather, patch_gather_with_statistics
from brainscale_kernels.pixel_loss import pixel_loss
from brainscale_kernels.spectral_patch import spectral_patch
from brainscale_kernels.spectral_volume import spectral_volume
from brainscale_kernels.spectrum import Form

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHARED_BYTES_PER_SM = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
SHARED_BYTES_OF_A_BLOCK = 1024
"""What every block takes beside its own."""
WARPS_PER_SM = 64
BLOCKS_PER_SM = 32
REGISTERS_PER_SM = 65536
"""These and the ones above: CUDA C++ Programming Guide, technical specifications per compute capability."""

# ------------------------------------------------------------------------------------------- variants

FULL, COARSE, ODD = (160, 192, 160), (80, 96, 80), (80, 96, 72)
"""Volumes (z, y, x): 1 mm, 2 mm, and one whose rows are not a multiple of 16 voxels."""
BATCH, COUNT = 2, 300


def _stored(volume_zyx: Sequence[int], dtype: torch.dtype) -> Stored:
    """Volumes that are never written to, and so take up no memory."""
    return Stored(torch.empty((BATCH, 1, *volume_zyx), dtype=dtype), *(torch.empty(BATCH) for _ in range(4)))


def _ids() -> Tensor:
    return torch.arange(COUNT).repeat(BATCH, 1)


def _gather(
    patch_zyx: Sequence[int], volume_zyx: Sequence[int] = FULL, stored: torch.dtype = torch.int16,
    tokens: torch.dtype = torch.bfloat16, statistics: bool = False,
) -> None:  # fmt: skip
    function = patch_gather_with_statistics if statistics else patch_gather
    function(_stored(volume_zyx, stored), _ids(), patch_zyx, tokens)


def _predictions(patch_zyx: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty((BATCH, COUNT, math.prod(patch_zyx)), dtype=dtype, requires_grad=True)


def _pixel(patch_zyx: Sequence[int], kind: str, normalize: bool, prediction: torch.dtype = torch.bfloat16) -> None:
    stored = _stored(FULL, torch.int16)
    pixel_loss(stored, _ids(), _predictions(patch_zyx, prediction), patch_zyx, kind, normalize)


def _volume(patch_zyx: Sequence[int], mode: str, volume_zyx: Sequence[int] = FULL) -> None:
    stored = _stored(volume_zyx, torch.int16)
    spectral_volume(stored, _ids(), _predictions(patch_zyx, torch.bfloat16), patch_zyx, Form(mode))


def _patch(
    patch_zyx: Sequence[int], mode: str, volume_zyx: Sequence[int] = FULL, prediction: torch.dtype = torch.bfloat16
) -> None:  # fmt: skip
    stored = _stored(volume_zyx, torch.int16)
    spectral_patch(stored, _ids(), _predictions(patch_zyx, prediction), patch_zyx, Form(mode))


VARIANTS: dict[str, Callable[[], object]] = {
    "gather 16³ int16 → bf16": partial(_gather, (16, 16, 16)),
    "gather 16³ int16 → f32, statistics": partial(_gather, (16, 16, 16), tokens=torch.float32, statistics=True),
    "gather 16³ uint8 → bf16": partial(_gather, (16, 16, 16), stored=torch.uint8),
    "gather 8³ int16 → bf16": partial(_gather, (8, 8, 8)),
    "gather 8³ int16 → f32, statistics": partial(_gather, (8, 8, 8), tokens=torch.float32, statistics=True),
    "gather 8³ f32 → bf16": partial(_gather, (8, 8, 8), stored=torch.float32),
    "gather 8³ int16 → bf16, 2 mm": partial(_gather, (8, 8, 8), COARSE),
    "gather 8³ int16 → bf16, rows of 72": partial(_gather, (8, 8, 8), ODD),
    "gather 12³ int16 → bf16": partial(_gather, (12, 12, 12), (144, 192, 144)),
    "gather 4×16×16 int16 → bf16": partial(_gather, (4, 16, 16)),
    "pixel 16³ mse of bf16, normalised": partial(_pixel, (16, 16, 16), "mse", True),
    "pixel 8³ mse of bf16, normalised": partial(_pixel, (8, 8, 8), "mse", True),
    "pixel 8³ l1 of f32": partial(_pixel, (8, 8, 8), "l1", False, torch.float32),
    "volume 16³ logmag": partial(_volume, (16, 16, 16), "logmag"),
    "volume 8³ logmag, 2 mm": partial(_volume, (8, 8, 8), "logmag", COARSE),
    "volume 8³ complex, rows of 72": partial(_volume, (8, 8, 8), "complex", ODD),
    "patch 16³ logmag": partial(_patch, (16, 16, 16), "logmag"),
    "patch 8³ logmag": partial(_patch, (8, 8, 8), "logmag"),
    "patch 12³ logmag": partial(_patch, (12, 12, 12), "logmag", (144, 192, 144)),
    "patch 16³ magnitude of f32": partial(_patch, (16, 16, 16), "magnitude", prediction=torch.float32),
    "patch 8³ complex, rows of 72": partial(_patch, (8, 8, 8), "complex", ODD),
}
"""Name → a call that launches. A new variant is a line here and a line in tests/compile_report_sm_90.jsonl."""


# ---------------------------------------------------------------------------------------- compilation


class _Driver:
    """In the place of Triton's driver, which wants a GPU: says what to compile for."""

    def __init__(self, arch: str) -> None:
        self.capability = int(arch.removeprefix("sm_"))

    def get_current_device(self) -> int:
        return self.capability  # under which Triton keeps what it compiled

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def report(arch: str) -> Iterator[dict[str, Any]]:
    """An object per kernel that a variant launches, in the order of VARIANTS; progress goes to stderr.

    Raises whatever Triton does where a kernel does not compile. From then on this process cannot launch kernels.
    """
    triton.runtime.driver.set_active(_Driver(arch))
    ptxas = get_ptxas(int(arch.removeprefix("sm_"))).version
    for number, (name, call) in enumerate(VARIANTS.items()):
        print(f"{arch} {number + 1}/{len(VARIANTS)}: {name}", file=sys.stderr, flush=True)
        with recording() as launches:
            call()
        # Launches of one kernel with arguments alike are one compiled kernel.
        kernels = {compiled.hash: (compiled, made) for made in launches for compiled in [_Compiled(made).result]}
        for position, (compiled, made) in enumerate(kernels.values()):
            figures = read_listing(_disassemble(compiled.asm["cubin"]))
            num_warps, shared_bytes = compiled.metadata.num_warps, compiled.metadata.shared
            yield {
                "name": name,
                "kernel": compiled.name,
                "position": position,
                "arch": arch,
                "num_warps": num_warps,
                "types": {name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"},
                "constants": made.constants,
                **figures,
                "shared_bytes": shared_bytes,
                "blocks_per_sm": blocks_per_sm(arch, figures["registers"], shared_bytes, num_warps),
                "triton": triton.__version__,
                "ptxas": ptxas,
            }


class _Compiled:
    """In the place of a kernel where `launch` runs it, so that options too are those of a launch: compiles it."""

    def __init__(self, recorded: Launch) -> None:
        self.kernel = recorded.kernel
        launch(self, recorded.grid, *recorded.arguments, num_warps=recorded.num_warps, **recorded.constants)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._compile, grid)

    def _compile(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        self.result = self.kernel.warmup(*arguments, grid=grid, **options)


def _disassemble(cubin: bytes) -> str:
    """Resource usage and machine code of a compiled kernel, by the cuobjdump that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "-sass", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ------------------------------------------------------------------------------------------- reading

OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)", re.MULTILINE)
GLOBAL_LOADS = {"LDG", "LD", "LDGSTS"}
GLOBAL_STORES = {"STG", "ST"}
ATOMICS = {"ATOM", "ATOMG", "RED", "REDG"}


def read_listing(text: str) -> dict[str, Any]:
    """Figures of a kernel from cuobjdump's resource usage and machine code.

    registers per thread; stack_bytes per thread; spill_stores and spill_loads: bytes that local memory is written and
    read, by spilled registers or arrays indexed at run time; load_bits and store_bits: width of an access to global
    memory → instructions (LDGSTS, which copies to shared memory, is a load); atomics and tensor_core: instruction →
    how often. Raises ValueError for a text without them.
    """
    usage, opcodes = re.search(r"REG:(\d+) STACK:(\d+)", text), OPCODE.findall(text)
    if usage is None or not opcodes:
        raise ValueError(f"cuobjdump gave no machine code, but {text[:200]!r}")
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    atomics: Counter[str] = Counter()
    tensor_core: Counter[str] = Counter()
    spill_stores = spill_loads = 0
    for opcode in opcodes:
        kind, bits = opcode.partition(".")[0], _bits(opcode)
        if kind in GLOBAL_LOADS:
            loads[bits] += 1
        elif kind in GLOBAL_STORES:
            stores[bits] += 1
        elif kind in ATOMICS:
            atomics[opcode] += 1
        elif kind == "STL":
            spill_stores += bits // 8
        elif kind == "LDL":
            spill_loads += bits // 8
        elif kind.endswith("MMA"):  # HMMA and the like, HGMMA of sm_90, UTCHMMA of sm_100
            tensor_core[opcode] += 1
    return {
        "registers": int(usage[1]),
        "stack_bytes": int(usage[2]),
        "spill_stores": spill_stores,
        "spill_loads": spill_loads,
        "load_bits": {str(bits): loads[bits] for bits in sorted(loads)},
        "store_bits": {str(bits): stores[bits] for bits in sorted(stores)},
        "atomics": dict(sorted(atomics.items())),
        "tensor_core": dict(sorted(tensor_core.items())),
    }


def _bits(opcode: str) -> int:
    """Width of a load or store: LDG.E.128 has 128, LDG.E.U16 16, LDG.E 32."""
    widths = (re.fullmatch(r"[US]?(8|16|64|128|256)", part) for part in opcode.split(".")[1:])
    return next((int(match[1]) for match in widths if match), 32)


def blocks_per_sm(arch: str, registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many blocks an SM holds: the least of what registers, shared memory, warps and the SM's limit leave.

    A warp's registers are given out in units of 256, and to warps in fours, as NVIDIA's occupancy calculator has it.
    """
    warps = REGISTERS_PER_SM // (-(-registers * 32 // 256) * 256) // 4 * 4
    by_shared = SHARED_BYTES_PER_SM[arch] // (shared_bytes + SHARED_BYTES_OF_A_BLOCK)
    return min(warps // num_warps, by_shared, WARPS_PER_SM // num_warps, BLOCKS_PER_SM)


# ------------------------------------------------------------------------------------------ command


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The report for people, a line per kernel."""
    heads = (
        "arch",
        "variant",
        "kernel",
        "warps",
        "regs",
        "spill",
        "shared",
        "blocks",
        "loads",
        "stores",
        "tensor core",
    )
    lines = [heads, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    loads, stores = (" ".join(f"{n}×{bits}" for bits, n in row[key].items()) for key in ("load_bits", "store_bits"))
    numbers = (row["num_warps"], row["registers"], row["spill_stores"], row["shared_bytes"], row["blocks_per_sm"])
    tensor_core = " ".join(f"{n}×{opcode}" for opcode, n in row["tensor_core"].items())
    return row["arch"], row["name"], row["kernel"], *map(str, numbers), loads, stores, tensor_core


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code (2: used wrongly)."""
    parser = argparse.ArgumentParser(
        prog="python -m brainscale_kernels.compile_report",
        description="Compile every kernel without a GPU and report what the compiler made of it.",
        epilog="example: python -m brainscale_kernels.compile_report --arch sm_90 --json report.jsonl",
    )
    parser.add_argument(
        "--arch", action="append", choices=ARCHITECTURES, help="compute capability, may be repeated (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write JSON lines, one object per kernel")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        value = os.environ.get("TRITON_INTERPRET")
        print(
            f"error: TRITON_INTERPRET is {value}, with which kernels are interpreted and never compiled; unset it",
            file=sys.stderr,
        )
        return 2
    rows = [row for arch in options.arch or ARCHITECTURES for row in report(arch)]
    print(table(rows))
    if options.json:
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        options.json.write_text("".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
