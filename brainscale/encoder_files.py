"""What an exported encoder is on disk, and reading it without trust. export.py writes it.

    DIR/config.json        format, model settings, contract, what it is, size and SHA-256 of the weights
    DIR/model.safetensors  fp32 tensors of the encoder, named "encoder." + their names in `vit.Encoder`
    DIR/README.md          for people

config.json is bounded and validated, and nothing of the sizes that it implies is allocated before a file of the size
and hash that it names was found to hold tensors of those names and shapes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open

from brainscale.checkpoint_files import Tensors
from brainscale.config import Config, ModelSettings
from brainscale.geometry import token_grid
from brainscale.model_counts import patch_voxels
from brainscale.prep_plan import Plan
from brainscale.settings import InputError, Model
from brainscale.vit import Encoder

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT, FORMAT_VERSION = "brainscale-encoder", 1
MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENS = 1 << 20


class Contract(Model):
    """How volumes were prepared that the encoder was trained on; others must be prepared alike."""

    plan: Plan
    plan_hash: str = Field(pattern="^[0-9a-f]{32}$")
    """Of the training store's plan, as the version of brainscale that made the store computed it."""
    volume_zyx: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Voxels of the volumes, or crops, that the encoder saw."""


class WeightsFile(Model):
    """What model.safetensors must be."""

    num_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ExportConfig(Model):
    """config.json of an export directory."""

    format: Literal["brainscale-encoder"] = "brainscale-encoder"
    format_version: Literal[1] = 1
    model: ModelSettings
    contract: Contract
    about: dict[str, Any]
    """As `pretrained.Pretrained.about`."""
    weights: WeightsFile


def read_export(folder: Path) -> tuple[ExportConfig, Tensors]:
    """What an export directory holds, its tensors by their names in `vit.Encoder`, in that order.

    Raises InputError, with one sentence, for anything that is not whole and ours.
    """
    config, path = read_config(folder), folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path} is missing; copy the whole export directory again")
    size = path.stat().st_size
    if size != config.weights.num_bytes:
        raise InputError(
            f"{path} has {size} bytes and {CONFIG} says {config.weights.num_bytes}; copy the export directory again"
        )
    if file_sha256(path) != config.weights.sha256:
        raise InputError(f"{path} does not have the SHA-256 that {CONFIG} says; copy the export directory again")
    width, depth = config.model.width, config.model.depth
    count = patch_voxels(config.model) * width + 3 * width + depth * (12 * width**2 + 13 * width)
    if 4 * count > size:
        raise InputError(f"{path} has {size} bytes, and a model of the settings in {CONFIG} {4 * count}; export again")
    z, y, x = token_grid(config.contract.volume_zyx, config.model.patch_voxels_zyx)
    if z * y * x > MAX_TOKENS:
        raise InputError(f"{folder / CONFIG} asks for {z * y * x} tokens, more than {MAX_TOKENS}; export again")
    return config, read_tensors(path, config.model, "encoder", alone=True)


def read_config(folder: Path) -> ExportConfig:
    """config.json of an export directory. Raises InputError."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            f"{folder} is no export of brainscale: it has no {CONFIG}; make one with `brainscale export RUN DIR`"
        )
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise InputError(
            f"{path} has more than {MAX_CONFIG_BYTES} bytes, so brainscale did not write it; give a directory that "
            "`brainscale export RUN DIR` made"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({one_line(error)}); copy the export directory again") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise InputError(
            f'{path} was not written by brainscale (its "format" is not "{FORMAT}"); give a directory that '
            "`brainscale export RUN DIR` made"
        )
    if tree.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format_version {tree.get('format_version')!r}, and this version of brainscale reads "
            f"{FORMAT_VERSION}; use the version that wrote it, or export again"
        )
    try:
        config = ExportConfig.model_validate(tree)
        Config(model=config.model)  # heads that do not divide the width
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{path} cannot be used ({'.'.join(map(str, first['loc']))}: {first['msg']}); export again"
        ) from None
    return config


def read_tensors(path: Path, settings: ModelSettings, part: str, alone: bool) -> Tensors:
    """fp32 tensors of an encoder out of a safetensors file, in which their names begin with `part` and a dot; by their
    names without it, in the encoder's order.

    alone: nothing else may be in the file. Raises InputError when the file or a tensor is not what it should be.
    """
    with torch.device("meta"):
        wanted = {name: list(t.shape) for name, t in Encoder(settings, (1, 1, 1)).state_dict().items()}
    try:
        with safe_open(path, framework="pt") as reader:
            held = set(reader.keys())
            names = {f"{part}.{name}" for name in wanted}
            if missing := names - held:
                raise InputError(
                    f"{path} lacks {len(missing)} of the {len(names)} tensors of this model ({min(missing)}, …), so it "
                    "is of another one; export again"
                )
            if alone and held > names:
                raise InputError(f"{path} holds other tensors as well ({min(held - names)}, …); export again")
            for name, shape in wanted.items():
                slice_ = reader.get_slice(f"{part}.{name}")
                if (slice_.get_shape(), slice_.get_dtype()) != (shape, "F32"):
                    raise InputError(
                        f"{path}: {part}.{name} is {slice_.get_dtype()} of shape {slice_.get_shape()}, and must be F32 "
                        f"of shape {shape}; export again"
                    )
            return {name: reader.get_tensor(f"{part}.{name}") for name in wanted}
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file ({one_line(error)}); copy it again") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())
