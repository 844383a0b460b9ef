"""The operations that `brainscale bench kernels` compares: their forms, and the bytes that none can do without."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from brainscale.bench import kernel_peers as forms
from brainscale.bench.kernel_peers import TOKENS, Inputs
from brainscale.geometry import Zyx

OURS = "brainscale"
INSTALL = "pip install -e '.[peers]'"

Forward = Callable[[Inputs, Zyx], Tensor]


@dataclass(frozen=True)
class Variant:
    """One form. same_as: a form that must give the same result (none: no other computes this); needs: a module that
    may be missing; compile: run it through torch.compile."""

    forward: Forward
    same_as: Forward | None
    compile: bool = False
    needs: str = ""

    def missing(self) -> str:
        """Why it cannot run here; "" when it can."""
        try:
            if self.needs:
                importlib.import_module(self.needs)
        except ImportError:
            return f"{self.needs} is not installed; {INSTALL}"
        return ""


@dataclass(frozen=True)
class Work:
    """One operation in its forms, the first being this project's. leaf: the input that a gradient is taken to, "" for
    none; reference: the form that ratios are to; minimum_bytes: what any form must move."""

    name: str
    leaf: str
    reference: str
    minimum_bytes: Callable[[Inputs], int]
    variants: dict[str, Variant] = field(hash=False)

    def gradient(self, output: Tensor, inputs: Inputs) -> Tensor | None:
        """The gradient to the leaf, of a loss or of tokens times the cotangent."""
        if not self.leaf:
            return None
        cotangent = inputs.cotangent if output.ndim else None
        return torch.autograd.grad(output, getattr(inputs, self.leaf), cotangent)[0]


# Ids count as well, and what has a gradient counts twice.


def _tokens(i: Inputs) -> int:
    return _nbytes(i.visible) + _voxels(i, i.visible) * (i.stored.volume.element_size() + TOKENS.itemsize)


def _embedding(i: Inputs) -> int:
    stored = _voxels(i, i.visible) * i.stored.volume.element_size()
    return _nbytes(i.visible, i.cotangent, i.cotangent, i.weight, i.weight) + stored


def _masked_patches(i: Inputs) -> int:
    stored = _voxels(i, i.masked) * i.stored.volume.element_size()
    return _nbytes(i.masked, i.prediction, i.prediction) + stored


def _volume(i: Inputs) -> int:
    return _nbytes(i.masked, i.stored.volume, i.prediction, i.prediction)


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def _voxels(i: Inputs, ids: Tensor) -> int:
    return ids.numel() * i.weight.shape[1]


WHOLE, SELECTED = "eager, whole volume", "eager, selected patches"
CONV3D, RFFTN, PUBLISHED = "Conv3d on everything, then gather", "eager, rfftn", "the paper's form"
COMPILED = "torch.compile, "

WORKS = (
    Work("gather", "", WHOLE, _tokens, {
        OURS: Variant(forms.gather_ours, forms.gather_reference),
        WHOLE: Variant(forms.gather_whole, forms.gather_reference),
        SELECTED: Variant(forms.gather_selected, forms.gather_reference),
        COMPILED + "whole volume": Variant(forms.gather_whole, forms.gather_reference, compile=True),
        COMPILED + "selected patches": Variant(forms.gather_selected, forms.gather_reference, compile=True),
    }),
    Work("patch embedding", "weight", CONV3D, _embedding, {
        OURS: Variant(forms.embed_ours, forms.embed_reference),
        CONV3D: Variant(forms.embed_conv3d, forms.embed_reference),
    }),
    Work("pixel loss", "prediction", WHOLE, _masked_patches, {
        OURS: Variant(forms.pixel_ours, forms.pixel_reference),
        WHOLE: Variant(forms.pixel_whole, forms.pixel_reference),
        SELECTED: Variant(forms.pixel_selected, forms.pixel_reference),
        COMPILED + "selected patches": Variant(forms.pixel_selected, forms.pixel_reference, compile=True),
    }),
    Work("spectral loss, volume", "prediction", PUBLISHED, _volume, {
        OURS: Variant(forms.volume_ours, forms.volume_reference),
        PUBLISHED: Variant(forms.volume_paper, forms.volume_paper_reference),
        RFFTN: Variant(forms.volume_tuned, forms.volume_reference),
        COMPILED + "the paper's form": Variant(forms.volume_paper, forms.volume_paper_reference, compile=True),
        COMPILED + "rfftn": Variant(forms.volume_tuned, forms.volume_reference, compile=True),
        "monai.losses.JukeboxLoss": Variant(forms.volume_jukebox, None, needs="monai"),
    }),
    Work("spectral loss, patch", "prediction", RFFTN, _masked_patches, {
        OURS: Variant(forms.patch_ours, forms.patch_reference),
        RFFTN: Variant(forms.patch_tuned, forms.patch_reference),
        COMPILED + "rfftn": Variant(forms.patch_tuned, forms.patch_reference, compile=True),
    }),
)  # fmt: skip
