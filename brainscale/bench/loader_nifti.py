"""The dataset of NIfTI files that is timed under torch's DataLoader, and a step of MONAI's. In a file of their own, so
that peers' workers import no more of this project when they start than a user's would."""

from typing import Any

import nibabel
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class NiftiFiles(Dataset[Tensor]):
    """(1,Z,Y,X) of NIfTI files: values as float32, or the stored integers."""

    def __init__(self, paths: list[str], codes: bool) -> None:
        self.paths, self.codes = paths, codes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> Tensor:
        image: Any = nibabel.load(self.paths[at])
        voxels = image.dataobj.get_unscaled() if self.codes else image.get_fdata(dtype=np.float32)
        return torch.from_numpy(np.ascontiguousarray(voxels.T))[None]


def contiguous(volume: Tensor) -> Tensor:
    """For MONAI's Lambda, by a name that workers find."""
    return volume.contiguous()
