"""A trained encoder, ready to use: volumes in, tokens out, with the contract of how volumes were prepared.

It comes from a run folder (`from_run`) or from an export directory (`load_encoder`). Nothing imported here needs
DeepSpeed or Triton.

Letters: B batch, N tokens, C width, L layers, Z Y X voxels.
"""

import hashlib
import importlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brainscale import checkpoint_files as files
from brainscale.config import Config, ModelSettings
from brainscale.encoder_files import CONFIG, WEIGHTS, Contract, one_line, read_export, read_tensors
from brainscale.geometry import Zyx, patchify, token_grid
from brainscale.layers import initialise
from brainscale.model_counts import encoder_sizes, model_flops, tokens_of
from brainscale.prep_plan import Plan
from brainscale.settings import InputError, changed_keys
from brainscale.stores import LAYOUT
from brainscale.vit import Encoder

CHANGES_NO_VALUE = (*LAYOUT, "min_extent_mm", "max_cropped_fraction", "warn_cropped_fraction")
"""Settings of a plan that say how voxels lie on disk, or which scans are refused, not what values a taken one gets."""

COUNTS = (
    "scans", "training_scans", "held_out_scans", "subjects", "contrasts", "not_skull_stripped", "refused_by_reason",
)  # fmt: skip
"""Of run.json: how many there were, never who."""


class Pretrained(nn.Module):
    """An encoder over the token grid of `contract.volume_zyx`, in evaluation mode.

    about: objective, part, step, samples (seen in training), flops_per_sample, flops (of the training), parameters,
    source (the run folder's name), versions, settings (of the training, without paths), data (counts of scans).
    """

    def __init__(self, settings: ModelSettings, contract: Contract, about: dict[str, Any]) -> None:
        """Weights are not set. Raises InputError when the patch does not divide the volume."""
        super().__init__()
        self.settings, self.contract, self.about = settings, contract, about
        self.encoder = Encoder(settings, token_grid(contract.volume_zyx, settings.patch_voxels_zyx))
        self.eval()

    def tokens(self, volumes_BZYX: Tensor, layers: Sequence[int] = (-1,)) -> Tensor:
        """Values as training read them, (B,Z,Y,X) → tokens (L,B,N,C) float32 in z, y, x order, x fastest.

        layers: -1 is behind the final norm, k from 0 on is the output of block k. Gradients are as the caller set them.
        Raises InputError for volumes of another size (`at` makes an encoder for it) and for a layer that there is not.
        """
        size, depth = tuple(volumes_BZYX.shape[1:]), self.settings.depth
        if size != self.contract.volume_zyx:
            raise InputError(
                f"got volumes of {size} voxels (z, y, x), and this encoder is for {self.contract.volume_zyx}; cut or "
                "pad them to that, or use at(volume_zyx)"
            )
        if wrong := [k for k in layers if not -1 <= k < depth]:
            raise InputError(
                f"got layer {wrong[0]}, and the encoder has blocks 0 to {depth - 1}, and -1 for behind the final norm"
            )
        found: dict[int, Tensor] = {}
        hooks = [
            self.encoder.trunk.blocks[k].register_forward_hook(lambda _, __, out, k=k: found.__setitem__(k, out))
            for k in {*layers} - {-1}
        ]
        try:
            volumes = volumes_BZYX[:, None].to(self.encoder.embed.weight.dtype)
            patches = patchify(volumes, self.settings.patch_voxels_zyx)
            ids = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
            found[-1] = self.encoder(patches, ids)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([found[k].float() for k in layers])

    def forward(self, volumes_BZYX: Tensor) -> Tensor:
        """Mean over tokens of the last layer: (B,Z,Y,X) → (B,C) float32."""
        return self.tokens(volumes_BZYX)[0].mean(1)

    def at(self, volume_zyx: Zyx) -> "Pretrained":
        """The same weights (a copy) for volumes of another size. A token keeps the position of its patch, counted from
        the corner of the volume, so a larger volume has positions that were never trained."""
        contract = self.contract.model_copy(update={"volume_zyx": tuple(volume_zyx)})
        return self._like(Pretrained(self.settings, contract, self.about), self.encoder.state_dict())

    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and bytes of all weights: the same for the same encoder, wherever it lies."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check(self, plan: Plan, what: str = "the store") -> None:
        """Raise InputError, with the settings that differ, unless `plan` gives the values that the encoder knows.

        what: whose plan that is, for the sentence.
        """
        known, given = (p.model_dump(mode="json", exclude=set(CHANGES_NO_VALUE)) for p in (self.contract.plan, plan))
        if changes := changed_keys(known, given):
            text = ", ".join(f"{key} = {now!r} in place of {before!r}" for key, before, now in changes)
            raise InputError(
                f"{what} was prepared otherwise than what the encoder was trained on ({text}); convert the scans again "
                "with the encoder's plan"
            )

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> "Pretrained":
        """An export directory, or one of a repository on the Hugging Face hub ("owner/name", at a branch, tag or
        commit), which takes the package huggingface_hub; only config.json and the weights are fetched. Raises as
        `load_encoder`."""
        if Path(name).exists():
            return load_encoder(name)
        try:
            fetch = importlib.import_module("huggingface_hub").snapshot_download
            folder = fetch(str(name), revision=revision, allow_patterns=[CONFIG, WEIGHTS])
        except ImportError:
            raise InputError(
                f"{name} is no folder; give an export directory, or pip install huggingface_hub to fetch from the hub"
            ) from None
        except (OSError, ValueError) as error:  # what huggingface_hub raises
            raise InputError(
                f"{name} is no folder, and cannot be fetched from the hub ({one_line(error)}); give an export "
                "directory or the name of a repository"
            ) from None
        return load_encoder(folder)

    def _like(self, other: "Pretrained", weights: files.Tensors) -> "Pretrained":
        """`other` with these weights, where and of the type that this one is."""
        other.encoder.load_state_dict(weights)
        return other.to(self.encoder.embed.weight)


def from_run(run_dir: str | Path, part: str = "encoder") -> Pretrained:
    """The encoder (or a JEPA's "teacher") of the newest intact checkpoint of a run, on the CPU; writes nothing.

    Warns of damaged checkpoints that are newer. Raises InputError where there is no intact one, for a part that the
    objective does not have, and when run.json is not about the checkpoint's data.
    """
    run = Path(run_dir)
    path = newest_intact(run)
    state = files.read_state(path)
    try:
        config = Config.model_validate(state.config)
        store = json.loads((run / "run.json").read_text(encoding="utf-8"))["store"]
        plan, plan_hash = Plan.model_validate(store["plan"]), str(store["plan_hash"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the settings of {run} cannot be read ({type(error).__name__}: {one_line(error)}); restore its run.json "
            "and checkpoint, or use the version of brainscale that trained it"
        ) from None
    if plan_hash != state.plan_hash:  # as recorded: a later version may count more settings
        raise InputError(
            f"{run / 'run.json'} tells of a store with plan {plan_hash[:8]}, and {path.name} was trained on plan "
            f"{state.plan_hash[:8]}; restore the run.json of that training, or train on until the next checkpoint"
        )
    parts = ("encoder", "teacher") if config.objective == "jepa" else ("encoder",)
    if part not in parts:
        raise InputError(f"a {config.objective} run has no part {part!r}; give {' or '.join(map(repr, parts))}")
    flops = model_flops(config, tokens_of(config, state.volume_zyx))
    about = {
        "objective": config.objective,
        "part": part,
        "step": state.step,
        "samples": state.cursor,
        "flops_per_sample": flops,
        "flops": flops * state.cursor,
        "parameters": sum(encoder_sizes(config.model)),
        "source": run.resolve().name,
        "versions": state.versions,
        "settings": _without_paths(config),
        "data": {name: store[name] for name in COUNTS if name in store},
    }
    contract = Contract(plan=plan, plan_hash=state.plan_hash, volume_zyx=state.volume_zyx)
    model = Pretrained(config.model, contract, about)
    model.encoder.load_state_dict(read_tensors(path / files.WEIGHTS, config.model, part, alone=False))
    return model


def _without_paths(config: Config) -> dict[str, Any]:
    """Settings of a run without the places where its data and it lay."""
    settings = config.model_dump(mode="json", exclude={"run": True})
    settings["data"]["store"] = ""
    for number, entry in enumerate(settings["data"]["stores"], start=1):
        entry["path"] = f"store {number}"
    return settings


def newest_intact(run: Path) -> Path:
    """Newest checkpoint of a run whose hashes hold. Warns and raises as `from_run`."""
    root = run / "checkpoints"
    found = files.directories(root)
    if not (run / "config.toml").is_file() or not found:
        raise InputError(f"{run} is no run folder with checkpoints; give the run.dir of a pretraining")
    damaged = []
    for path in reversed(found):
        problem = files.damage(path)
        if problem is None:
            break
        damaged.append(problem)
    else:
        raise InputError(f"none of the {len(found)} checkpoints in {root} is intact ({damaged[0]}); restore one")
    for problem in damaged:
        warnings.warn(f"a damaged checkpoint is passed over for {path.name}: {problem}", stacklevel=3)
    return path


def load_encoder(directory: str | Path) -> Pretrained:
    """The encoder of an export directory, on the CPU. Raises InputError for anything that is not whole and ours."""
    config, tensors = read_export(Path(directory))
    model = Pretrained(config.model, config.contract, config.about)
    model.encoder.load_state_dict(tensors)
    return model


def open_pretrained(path: str | Path, part: str = "encoder") -> Pretrained:
    """The encoder of a run folder, or of an export directory, where `part` was chosen when it was made."""
    return from_run(path, part) if (Path(path) / "config.toml").is_file() else load_encoder(path)


def random_like(pretrained: Pretrained, seed: int) -> Pretrained:
    """An encoder of the same shape that has learned nothing: what a run with this seed begins with."""
    nothing = {"objective": "random", "step": 0, "samples": 0, "flops_per_sample": 0, "flops": 0}
    about = {**pretrained.about, **nothing, "source": f"seed {seed}"}
    other = Pretrained(pretrained.settings, pretrained.contract, about)
    initialise(other.encoder, torch.Generator().manual_seed(seed))
    return pretrained._like(other, other.encoder.state_dict())
