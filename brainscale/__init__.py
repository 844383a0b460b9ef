"""Self-supervised pretraining of 3D vision transformers on brain MRI.

Importing this package imports nothing heavy: conversion workers and `--help` start quickly.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    """`load_encoder` on first use; see pretrained.py."""
    if name == "load_encoder":
        return import_module("brainscale.pretrained").load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
