"""What the compiler makes of the kernels: promises that hold with any Triton, and the kept figures of one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from brainscale_kernels.compile_report import blocks_per_sm, read_listing

ROOT = Path(__file__).parent.parent
KEPT = Path(__file__).parent / "compile_report_sm_90.jsonl"
AGAIN = f"python -m brainscale_kernels.compile_report --arch sm_90 --json {KEPT.relative_to(ROOT)}"
BYTES = {"i8": 1, "u8": 1, "i16": 2, "fp16": 2, "bf16": 2, "fp32": 4}
Row = dict[str, Any]


def run_report(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: in this one kernels may be interpreted."""
    command = [sys.executable, "-m", "brainscale_kernels.compile_report", *map(str, arguments)]
    rest = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=rest | environment)


def report(folder: Path, *architectures: str) -> list[Row]:
    wanted = [word for arch in architectures for word in ("--arch", arch)]
    done = run_report(*wanted, "--json", folder / "report.jsonl", TRITON_CACHE_DIR=str(folder / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read(folder / "report.jsonl")
    assert len(done.stdout.splitlines()) == len(rows) + 1  # the table
    return rows


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Every kernel on sm_90."""
    return report(tmp_path_factory.mktemp("sm_90"), "sm_90")


WIDE = {
    "_gather_kernel": (["volume"], ["tokens"]),
    "_pixel_kernel": (["volume", "prediction"], ["gradient"]),
    "_moments_kernel": (["volume", "prediction"], []),
    "_assemble_kernel": (["volume", "prediction"], ["scored", "scored"]),
    "_gradient_kernel": (["inverse", "prediction"], ["gradient"]),
    "_patch_kernel": (["volume", "prediction"], ["gradient"]),
}
"""Kernels that work on whole patches: the tensors of which they read a tile, and of which they write one."""


def tile_bytes(row: Row, tensors: list[str]) -> int:
    """Bytes of a tile of each of these tensors."""
    sizes = row["constants"]
    patches = ("N", "QZ", "QY", "QX") if row["kernel"] == "_patch_kernel" else ("PATCHES", "ELEMENTS")
    return math.prod(sizes[name] for name in patches) * sum(voxel_bytes(row, name) for name in tensors)


def voxel_bytes(row: Row, tensor: str) -> int:
    return BYTES[row["types"][tensor].removeprefix("*")]


def wide_bytes(row: Row, key: str) -> int:
    """Bytes that all threads together move in accesses of 16 bytes."""
    return row[key].get("128", 0) * 16 * 32 * row["num_warps"]


def could_be_wide(row: Row) -> bool:
    """Whether the rows of a patch start at, and are, multiples of 16 bytes."""
    rows = (row["constants"]["PX"], row["constants"].get("UNIT", 16))
    return all(voxels * voxel_bytes(row, name) % 16 == 0 for voxels in rows for name in WIDE[row["kernel"]][0])


# ------------------------------------------------------------------------------------------- promises


@pytest.mark.slow
def test_no_kernel_spills(rows):
    spilling = [(r["name"], r["kernel"]) for r in rows if r["stack_bytes"] or r["spill_stores"] or r["spill_loads"]]
    assert not spilling


@pytest.mark.slow
def test_registers_and_shared_memory_leave_two_blocks_per_sm(rows):
    alone = [(r["name"], r["kernel"], r["registers"], r["shared_bytes"]) for r in rows if r["blocks_per_sm"] < 2]
    assert not alone


@pytest.mark.slow
@pytest.mark.parametrize("kernel", WIDE)
def test_patches_are_read_and_written_16_bytes_at_a_time(kernel, rows):
    read, written = WIDE[kernel]
    wide = [row for row in rows if row["kernel"] == kernel and could_be_wide(row)]
    assert {(16, 16, 16), (8, 8, 8)} <= {tuple(row["constants"][axis] for axis in ("PZ", "PY", "PX")) for row in wide}
    for row in wide:
        assert wide_bytes(row, "load_bits") == tile_bytes(row, read), row
        assert wide_bytes(row, "store_bits") == tile_bytes(row, written), row


@pytest.mark.slow
def test_spectra_of_patches_are_made_by_tensor_cores(rows):
    patches = [row for row in rows if row["kernel"] == "_patch_kernel"]
    assert patches
    for row in patches:
        assert row["tensor_core"], row


# --------------------------------------------------------------------------------------- kept figures


@pytest.mark.slow
def test_figures_are_the_kept_ones(rows):
    kept = read(KEPT)
    versions = {(r["triton"], r["ptxas"]) for r in kept}
    assert len(versions) == 1
    here = (rows[0]["triton"], rows[0]["ptxas"])
    if here not in versions:
        pytest.skip(f"kept for Triton and ptxas {versions.pop()}, here {here}")
    changes = []
    for key, was, now in paired(kept, rows):
        if was is None or now is None:
            changes.append(f"{key}: {'new' if was is None else 'gone'}")
        else:
            changes += [f"{key}: {name} was {was.get(name)}, is {v}" for name, v in now.items() if was.get(name) != v]
    assert not changes, "\n".join([*changes, f"if that is meant: {AGAIN}"])


def paired(kept: list[Row], rows: list[Row]) -> list[tuple[str, Row | None, Row | None]]:
    """(name of a kernel, what it was, what it is)."""
    was, now = ({f"{r['name']}: {r['kernel']} {r['position']}": r for r in some} for some in (kept, rows))
    assert (len(was), len(now)) == (len(kept), len(rows))
    return [(key, was.get(key), now.get(key)) for key in was | now]


@pytest.mark.slow
def test_every_kernel_compiles_for_the_other_architectures(rows, tmp_path):
    others = report(tmp_path, "sm_80", "sm_100")
    kernels = [(r["name"], r["kernel"], r["position"]) for r in rows]
    for arch in ("sm_80", "sm_100"):
        assert [(r["name"], r["kernel"], r["position"]) for r in others if r["arch"] == arch] == kernels
    assert all(r["blocks_per_sm"] for r in others)


# ------------------------------------------------------------------------------------------ the report


def test_refuses_in_one_sentence_where_kernels_are_interpreted():
    done = run_report("--arch", "sm_90", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: TRITON_INTERPRET is 1")


LISTING = """
Resource usage:
 Function k:
  REG:{registers} STACK:32 SHARED:1024 LOCAL:0 CONSTANT[0]:472
        code for sm_90a
        /*0000*/                   LDC R1, c[0x0][0x28] ;                            /* 0x00000a00ff017b82 */
                                                                                     /* 0x000e220000000800 */
        /*0150*/              @!P0 LDG.E.64 R10, desc[UR4][R6.64] ;                  /* 0x00000004060a8981 */
        /*0160*/             @!UP0 LDG.E.U8.CONSTANT R10, desc[UR4][R6.64] ;         /* 0x00000004060a8981 */
        /*0170*/              @!PT LDG.E R10, desc[UR4][R6.64] ;                     /* 0x00000004060a8981 */
        /*06b0*/                   LDGSTS.E.BYPASS.LTC128B.128 [R39], desc[UR40][R4.64] ; /* 0x0000000004277fae */
        /*06c0*/                   LDS.128 R4, [R39] ;                               /* 0x0000000004277fae */
        /*06d0*/                   STL.64 [R1], R4 ;                                 /* 0x0000000004277fae */
        /*06e0*/                   LDL.LU R4, [R1+0x4] ;                             /* 0x0000000004277fae */
        /*0f20*/                   HMMA.16816.F32 R128, R16.reuse, R156, RZ ;        /* 0x0000009c1080723c */
        /*0f30*/                   HGMMA.64x128x16.F32 R88, gdesc[UR4].tnspB, RZ, !UPT ; /* 0x41e00000045879f0 */
        /*0f40*/                   HGMMA.64x128x16.F32 R88, gdesc[UR4].tnspB, R88, gsb0 ; /* 0x41e00000045879f0 */
        /*1210*/                   UTCHMMA gdesc[UR6], gdesc[UR14], tmem[UR9], tmem[UR44] ; /* 0x00ff2c0e060075ea */
        /*32e0*/                   STG.E.128 desc[UR40][R16.64+0x1000], R36 ;        /* 0x0010002410007986 */
        /*32f0*/                   STG.E.U16 desc[UR40][R16.64+0x1000], R36 ;        /* 0x0010002410007986 */
        /*3bc0*/                   ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU PT, RZ, desc[UR40][R2.64], R5 ; /* 0x8000000502ff79a3 */
        /*3bd0*/                   FFMA R5, R2, R5, R5 ;                             /* 0x8000000502ff79a3 */
"""  # noqa: E501  (as cuobjdump prints it)


def test_reads_what_cuobjdump_prints():
    assert read_listing(LISTING.format(registers=56)) == {
        "registers": 56,
        "stack_bytes": 32,
        "spill_stores": 8,
        "spill_loads": 4,
        "load_bits": {"8": 1, "32": 1, "64": 1, "128": 1},
        "store_bits": {"16": 1, "128": 1},
        "atomics": {"ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU": 1},
        "tensor_core": {"HGMMA.64x128x16.F32": 2, "HMMA.16816.F32": 1, "UTCHMMA": 1},
    }


def test_a_text_without_code_is_no_report_of_zeros():
    with pytest.raises(ValueError, match="no machine code"):
        read_listing("Resource usage:\n Function k:\n  REG:40 STACK:0\n")


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "blocks"),
    [
        (32, 0, 4, 16),  # 64 warps an SM
        (128, 0, 8, 2),  # 65536 registers, all of them
        (129, 0, 8, 1),  # given out in units of 8 a thread
        (72, 0, 4, 7),  # 28 warps
        (56, 0, 1, 32),  # blocks an SM
        (40, 113 * 1024, 4, 2),  # 228 KiB, 1 KiB of each block taken
        (40, 114 * 1024, 4, 1),
    ],
)
def test_blocks_per_sm(registers, shared_bytes, num_warps, blocks):
    assert blocks_per_sm("sm_90", registers, shared_bytes, num_warps) == blocks
