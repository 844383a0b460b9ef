"""An encoder under the names of MONAI's ViT and of timm's, for models with fixed positions (`position = "sincos"`).

Both libraries add a table of positions to the tokens, which is what "sincos" does; rotary positions turn queries and
keys inside every attention, and the same tensors without them compute something else, so those are refused.

Same in all three: pre-norm blocks, one qkv matrix with rows in the order (q, k, v) × heads × width of a head, exact
GELU, an MLP of 4·C. The patch embedding becomes a convolution with stride = kernel over (B,1,Z,Y,X): axes in the order
z, y, x, as stored volumes have them. Names are those of MONAI 1.5 and 1.6 and of timm 1.0.

Letters: C width, N tokens, Z Y X voxels.
"""

import importlib
from typing import Any

from torch import Tensor, nn

from brainscale.checkpoint_files import Tensors
from brainscale.pretrained import Pretrained
from brainscale.settings import InputError

NORM_EPS = 1e-5
"""Of every norm; timm's ViT has 1e-6 unless told."""
MONAI_BLOCK = {
    "norm1": "norm1", "attention.qkv": "attn.qkv", "attention.project": "attn.out_proj", "norm2": "norm2",
    "mlp.0": "mlp.linear1", "mlp.2": "mlp.linear2",
}  # fmt: skip
TIMM_BLOCK = {
    "norm1": "norm1", "attention.qkv": "attn.qkv", "attention.project": "attn.proj", "norm2": "norm2",
    "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2",
}  # fmt: skip


def monai_arguments(pretrained: Pretrained) -> dict[str, Any]:
    """Arguments of `monai.networks.nets.ViT` that the tensors are for."""
    settings = pretrained.settings
    return {
        "in_channels": 1,
        "img_size": list(pretrained.contract.volume_zyx),
        "patch_size": list(settings.patch_voxels_zyx),
        "hidden_size": settings.width,
        "mlp_dim": 4 * settings.width,
        "num_layers": settings.depth,
        "num_heads": settings.heads,
        "proj_type": "conv",
        "pos_embed_type": "learnable",
        "qkv_bias": True,
    }


def monai_tensors(pretrained: Pretrained) -> Tensors:
    """State dict of `monai.networks.nets.ViT(**monai_arguments(…))`. Raises InputError for rotary positions.

    MONAI 1.6 builds a norm for cross-attention in every block and never calls it: it is there as a fresh norm.
    """
    tensors = _renamed(pretrained, "MONAI's ViT", MONAI_BLOCK)
    embedding = {
        "patch_embedding.position_embeddings": _positions(pretrained),
        "patch_embedding.patch_embeddings.weight": _kernel(pretrained),
        "patch_embedding.patch_embeddings.bias": pretrained.encoder.embed.bias.detach(),
    }
    unused: Tensors = {}
    for k in range(pretrained.settings.depth):
        norm = nn.LayerNorm(pretrained.settings.width)
        unused |= {f"blocks.{k}.norm_cross_attn.{name}": t.detach() for name, t in norm.named_parameters()}
    return embedding | tensors | unused


def to_monai(pretrained: Pretrained) -> nn.Module:
    """The encoder as a `monai.networks.nets.ViT` in evaluation mode, on the CPU: (B,1,Z,Y,X) → (tokens (B,N,C) behind
    the final norm, list of every block's output). The tokens are those of `Pretrained.tokens`.

    Raises InputError for rotary positions, and where MONAI is not installed or is one whose ViT has other tensors.
    """
    tensors = monai_tensors(pretrained)
    try:
        made = importlib.import_module("monai.networks.nets").ViT(**monai_arguments(pretrained))
    except ImportError as error:
        raise InputError(f"MONAI cannot be imported ({error}); pip install monai") from None
    own = made.state_dict()
    idle = {name for name in own if ".cross_attn." in name}  # MONAI 1.5: built in every block and never called
    given = {name: tensor for name, tensor in tensors.items() if name in own or ".norm_cross_attn." not in name}
    if {name: t.shape for name, t in given.items()} != {n: t.shape for n, t in own.items() if n not in idle}:
        raise InputError("the ViT of the installed MONAI has other tensors than that of 1.5 and 1.6; use one of these")
    made.load_state_dict(given, strict=False)
    return made.eval()


def timm_tensors(pretrained: Pretrained) -> Tensors:
    """Tensors under the names of timm's VisionTransformer without a class token; the kernel of the patch embedding has
    three axes. Its norms need `NORM_EPS`. Raises InputError for rotary positions, which these names do not carry."""
    tensors = _renamed(pretrained, "timm's ViT", TIMM_BLOCK)
    embedding = {
        "pos_embed": _positions(pretrained),
        "patch_embed.proj.weight": _kernel(pretrained),
        "patch_embed.proj.bias": pretrained.encoder.embed.bias.detach(),
    }
    return embedding | tensors


def timm_arguments(pretrained: Pretrained) -> dict[str, Any]:
    """Arguments of `timm.models.VisionTransformer` beside a patch embedding in 3D and norms with `norm_eps`."""
    settings = pretrained.settings
    return {
        "img_size": list(pretrained.contract.volume_zyx),
        "patch_size": list(settings.patch_voxels_zyx),
        "in_chans": 1,
        "num_classes": 0,
        "global_pool": "avg",
        "embed_dim": settings.width,
        "depth": settings.depth,
        "num_heads": settings.heads,
        "class_token": False,
        "fc_norm": False,
        "norm_eps": NORM_EPS,
    }


def _renamed(pretrained: Pretrained, whose: str, block: dict[str, str]) -> Tensors:
    """Tensors of the blocks and the final norm, on the CPU. block: names in a block of ours → theirs."""
    if pretrained.settings.position != "sincos":
        raise InputError(
            f"{whose} has no rotary positions, so weights trained with model.position = "
            f'"{pretrained.settings.position}" would compute something else in it; train with '
            'model.position = "sincos", or use brainscale.load_encoder'
        )
    found = {}
    for name, tensor in pretrained.encoder.trunk.state_dict().items():
        if name.startswith("blocks."):
            _, k, rest = name.split(".", 2)
            stem, _, kind = rest.rpartition(".")
            name = f"blocks.{k}.{block[stem]}.{kind}"
        found[name] = tensor.cpu()
    return found


def _positions(pretrained: Pretrained) -> Tensor:
    """(1,N,C) fixed position of every token."""
    return pretrained.encoder.trunk.fixed[None].cpu()


def _kernel(pretrained: Pretrained) -> Tensor:
    """(C,1,z,y,x) of the patch embedding as a convolution."""
    return pretrained.encoder.embed.weight.detach().cpu().unflatten(1, (1, *pretrained.settings.patch_voxels_zyx))
