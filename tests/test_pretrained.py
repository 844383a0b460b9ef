"""An encoder out of a run or an export: the same features as in training, and refusals for what is not one."""

import torch

from brainscale import checkpoint_files as files
from brainscale.config import Config
from brainscale.loader import Batch
from brainscale.mae import Mae
from brainscale.ops import Stored
from brainscale.pretrained import from_run
from brainscale.reader import normalisation
from brainscale.settings import load
from brainscale.stores import Stores


def stored(store: Stores) -> Stored:
    """All volumes of a store, as the training loop holds them."""
    parameters = (torch.from_numpy(values) for values in normalisation(store))
    return Stored(torch.from_numpy(store.volumes(store.rows))[:, None], *parameters)


def values(store: Stores) -> torch.Tensor:
    """(rows,Z,Y,X) float32 as the encoder reads them."""
    held = stored(store)
    scale, offset, low, high = (v[:, None, None, None] for v in held[1:])
    return (held.volume[:, 0].float() * scale + offset).clamp(low, high)


def test_features_of_a_run_are_those_of_the_training_model(unbroken, tiny_store, tiny_config):
    pretrained, store = from_run(unbroken), Stores([tiny_store])
    config = load(Config, tiny_config)
    model = Mae(config, store.volume_zyx)
    model.load_state_dict(files.read_weights(files.directories(unbroken / "checkpoints")[-1]))
    held = stored(store)
    ids = torch.arange(12).expand(len(store.rows), -1)
    foreground = torch.ones(len(store.rows), 12)
    with torch.no_grad():
        wanted = model.embed(Batch(*held, foreground, store.rows, store.rows), ids)
        tokens = pretrained.tokens(values(store))
        assert tokens.shape == (1, 10, 12, 24)
        torch.testing.assert_close(tokens[0], wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(pretrained(values(store)), wanted.mean(1), atol=1e-5, rtol=0)
    assert pretrained.about["step"] == 40 and pretrained.about["samples"] == 160
    assert pretrained.about["flops"] == 160 * model.flops() and pretrained.contract.plan == store.plan
