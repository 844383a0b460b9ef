"""Self-supervised pretraining of 3D vision transformers on brain MRI.

Importing this package imports nothing heavy: conversion workers and `--help` start quickly.
"""

__version__ = "0.1.0"
