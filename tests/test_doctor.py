"""What the doctor says about stores."""

from test_store import ROWS, SHARD, make_plan, make_store

from brainscale.doctor import check_store, describe_store


def test_a_healthy_store_is_described(tmp_path):
    path = make_store(tmp_path / "s", make_plan(spacing_mm_xyz=(1.0, 1.5, 2.0)))
    assert check_store(path, deep=True) == []
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and f.name != "COMPLETE.json")
    assert describe_store(path).splitlines() == [
        f"{path}: {ROWS - 1} scans, {size / 1e6:.1f} MB, plan {make_plan(spacing_mm_xyz=(1.0, 1.5, 2.0)).hash()}",
        "grid 10 × 12 × 8 voxels (x, y, z) at 1 × 1.5 × 2 mm, int16 in lz4",
        "refused: 1 (does_not_fit 1)",
        "warnings: 3 (cropped 1, duplicate_of 1, no_contrast 1)",
    ]


def test_native_spacing_claims_no_millimetres(tmp_path):
    path = make_store(tmp_path / "s", make_plan(spacing_mm_xyz="native"))
    assert "each scan's own spacing" in describe_store(path) and " mm" not in describe_store(path)


def test_each_problem_is_one_line(tmp_path):
    path = make_store(tmp_path / "s")
    (path / SHARD).unlink()
    (path / "volumes/c/0/0/0/0").write_bytes(b"")
    for deep in (False, True):
        problems = check_store(path, deep)
        assert len(problems) == 2 and not any("\n" in problem for problem in problems)
    assert [problem for problem in check_store(path, deep=False) if SHARD in problem] == [f"{path / SHARD} is missing"]
