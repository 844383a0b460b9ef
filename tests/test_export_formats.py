"""The encoder in MONAI's ViT, the real one, and under timm's names: the same features, or a refusal that says why."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from torch import nn

from brainscale import encoder_files, load_encoder
from brainscale.config import ModelSettings
from brainscale.export import export
from brainscale.export_formats import NORM_EPS, monai_tensors, timm_arguments, timm_tensors, to_monai
from brainscale.prep_plan import Plan
from brainscale.pretrained import Pretrained, from_run
from brainscale.settings import InputError

VOLUME_ZYX = (16, 24, 8)


def trained(position: str = "sincos") -> Pretrained:
    """An encoder whose every tensor is random, norms and biases too, on a grid with three different axes."""
    settings = ModelSettings(width=48, depth=3, heads=4, patch_voxels_zyx=(8, 4, 2), position=position)
    contract = encoder_files.Contract(plan=Plan(), plan_hash=Plan().hash(), volume_zyx=VOLUME_ZYX)
    made = Pretrained(settings, contract, {})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2, generator=generator)
    return made


@pytest.fixture(scope="module")
def volumes() -> torch.Tensor:
    return torch.randn((2, *VOLUME_ZYX), generator=torch.Generator().manual_seed(4))


def monai_vit() -> type[nn.Module]:
    """MONAI's class, or a skip that says how to get it."""
    return pytest.importorskip("monai.networks.nets", reason="MONAI is a peer: pip install monai").ViT


@torch.no_grad()
def test_features_in_monai_are_the_same(volumes):
    monai_vit()
    encoder = trained()
    tokens, blocks = to_monai(encoder)(volumes[:, None])
    wanted = encoder.tokens(volumes, (-1, 0, 1, 2))
    torch.testing.assert_close(tokens, wanted[0], atol=1e-4, rtol=0)
    for k, block in enumerate(blocks, start=1):
        torch.testing.assert_close(block, wanted[k], atol=1e-4, rtol=0)


@torch.no_grad()
def test_positions_matter_to_the_comparison(volumes):
    """With another position, or axes in another order, the features differ by far more than the tolerance."""
    monai_vit()
    encoder = trained()
    model = to_monai(encoder)
    wanted = encoder.tokens(volumes)[0]
    model.patch_embedding.position_embeddings.zero_()
    assert (model(volumes[:, None])[0] - wanted).abs().max() > 0.01
    model = to_monai(encoder)
    assert (model(volumes.flip(1)[:, None])[0] - wanted).abs().max() > 0.01


def test_rotary_positions_are_refused_with_the_reason():
    for convert in (to_monai, monai_tensors, timm_tensors):
        with pytest.raises(InputError, match=r'no rotary positions.*"rope" would compute something else'):
            convert(trained("rope"))


class Embed3d(nn.Module):
    """A patch embedding in 3D as timm's ViT takes one."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True, **_):
        super().__init__()
        self.proj = nn.Conv3d(in_chans, embed_dim, tuple(patch_size), tuple(patch_size), bias=bias)
        self.num_patches = 1
        for size, patch in zip(img_size, patch_size):
            self.num_patches *= size // patch

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


@torch.no_grad()
def test_features_in_timm_are_the_same(volumes):
    """In timm's own VisionTransformer, with a patch embedding in 3D."""
    made = pytest.importorskip("timm", reason="optional: pip install timm").models.VisionTransformer
    encoder = trained()
    arguments = timm_arguments(encoder)
    norm = partial(nn.LayerNorm, eps=arguments.pop("norm_eps"))
    model = made(**arguments, embed_layer=Embed3d, norm_layer=norm).eval()
    model.load_state_dict(timm_tensors(encoder))
    torch.testing.assert_close(model.forward_features(volumes[:, None]), encoder.tokens(volumes)[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(volumes[:, None]), encoder(volumes), atol=1e-4, rtol=0)


def test_timm_names():
    """As timm 1.0 names them: no more, no fewer, and the shapes of a ViT with a three-axis kernel."""
    encoder = trained()
    block = {
        "norm1.weight": (48,), "norm1.bias": (48,), "attn.qkv.weight": (144, 48), "attn.qkv.bias": (144,),
        "attn.proj.weight": (48, 48), "attn.proj.bias": (48,), "norm2.weight": (48,), "norm2.bias": (48,),
        "mlp.fc1.weight": (192, 48), "mlp.fc1.bias": (192,), "mlp.fc2.weight": (48, 192), "mlp.fc2.bias": (48,),
    }  # fmt: skip
    wanted = {"pos_embed": (1, 48, 48), "patch_embed.proj.weight": (48, 1, 8, 4, 2), "patch_embed.proj.bias": (48,)}
    wanted |= {"norm.weight": (48,), "norm.bias": (48,)}
    wanted |= {f"blocks.{k}.{name}": shape for k in range(3) for name, shape in block.items()}
    assert {name: tuple(t.shape) for name, t in timm_tensors(encoder).items()} == wanted
    assert all(m.eps == NORM_EPS for m in encoder.modules() if isinstance(m, nn.LayerNorm))


@pytest.fixture(scope="module")
def run(tiny_store, tiny_config, tmp_path_factory) -> Path:
    """A run of two steps with fixed positions."""
    run = tmp_path_factory.mktemp("formats") / "run"
    more = ("train.num_steps=3", 'model.position="sincos"')
    run_ranks("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", *more, logs=run.parent / "logs")
    return run


@torch.no_grad()
@pytest.mark.parametrize("form", ["brainscale", "monai", "timm"])
@pytest.mark.slow
def test_the_lines_of_the_card_work(form, run, tmp_path):
    if form == "monai":
        monai_vit()
    folder = export(run, tmp_path / form, form=form)
    lines = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    volumes = torch.randn((2, 16, 24, 16), generator=torch.Generator().manual_seed(5))
    names = {"volumes": volumes}
    exec(lines.replace("DIR", str(folder)), names)
    encoder = from_run(run)
    if form == "brainscale":
        assert torch.equal(names["features"], encoder(volumes))
        return
    if form == "monai":
        torch.testing.assert_close(names["tokens"], encoder.tokens(volumes)[0], atol=1e-4, rtol=0)
    else:
        assert names["tensors"].keys() == timm_tensors(encoder).keys()
    config = json.loads((folder / "config.json").read_text())
    assert config["contract"]["plan_hash"] == encoder.contract.plan_hash
    with pytest.raises(InputError, match='its "format" is not "brainscale-encoder"'):
        load_encoder(folder)
