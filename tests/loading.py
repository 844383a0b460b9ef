"""What tests of the loaders share: a loader of a store from settings."""

from pathlib import Path

import torch

from brainscale.config import Config
from brainscale.dali_loader import DaliLoader, available
from brainscale.loader import Loader
from brainscale.reader import Reader
from brainscale.samplers import make_order
from brainscale.settings import load
from brainscale.stores import open_stores

NO_DALI = "" if available() else "DALI is not installed: pip install 'brainscale-mri[dali]'"
NO_GPU = "" if torch.cuda.is_available() else "no CUDA GPU"
LOADERS = {"torch": Loader, "dali": DaliLoader}
CPU = torch.device("cpu")
AUGMENTED = (
    "augment.affine_fraction=0.5", "augment.gamma_fraction=0.5", "augment.gain_fraction=0.5",
    "augment.bias_fraction=0.5", "augment.noise_fraction=0.5", "augment.blur_fraction=0.5", "data.flip_fraction=0.5",
)  # fmt: skip


def make_loader(kind, store, *overrides, rank=0, ranks=1, micro=4, device=CPU):
    """A loader of all rows of a store, or of several."""
    config = load(Config, None, ("model.patch_voxels_zyx=[8,8,8]", *overrides))
    stores = open_stores([store] if isinstance(store, str | Path) else store)
    reader = Reader(stores, config.model.patch_voxels_zyx, config.data.crop_voxels_zyx, config.seed)
    order = make_order(stores, stores.rows, config)
    return LOADERS[kind](reader, order, config, rank, ranks, micro, device)


def take(loader, number, cursor=0):
    """So many batches from a cursor, and the cursor after them."""
    batches = loader.batches(cursor)
    found = [next(batches) for _ in range(number)]
    batches.close()
    return [batch for batch, _ in found], found[-1][1]
