"""The store in other people's hands: napari's reader, and plain zarr-python with tensorstore."""

import numpy as np
import pytest
import tensorstore as ts
import zarr
from conftest import write_tiny_store

from brainscale.prep_plan import Plan
from brainscale.store import Store


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    plan = Plan(grid_voxels_xyz=(16, 24, 16), spacing_mm_xyz=(2, 2, 3), shard_volumes=4, chunk_voxels_zyx=(8, 8, 8))
    return write_tiny_store(tmp_path_factory.mktemp("stores") / "store", plan=plan)


def test_plain_zarr_and_tensorstore_read_what_brainscale_reads(path):
    store = Store(path)
    group = zarr.open_group(path, mode="r")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/volumes/"}}
    array = ts.open(spec, open=True, read=True).result()
    for row in store.rows:
        volume = store.volumes([int(row)])[0]
        np.testing.assert_array_equal(np.asarray(group["volumes"][int(row)]), volume)
        np.testing.assert_array_equal(array[int(row)].read().result(), volume)


@pytest.mark.slow
def test_napari_shows_every_scan_in_scaled_voxel_space(path):
    reader = pytest.importorskip("napari_ome_zarr", reason="pip install -e '.[viewers]' brings napari's reader")
    layers = reader.napari_get_reader(str(path))(str(path))
    assert len(layers) == 1
    data, settings, kind = layers[0]
    assert kind == "image"
    shown = data[0] if isinstance(data, list) else data
    assert shown.shape == (10, 16, 24, 16)
    assert list(settings["scale"]) == [1, 3, 2, 2]
    np.testing.assert_array_equal(np.asarray(shown[3]), Store(path).volumes([3])[0])
