"""What a process that reads for DALI does for one sample. No torch, which would cost it seconds and memory."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection
from typing import Any

import numpy as np

from brainscale import augment
from brainscale.store_files import StoreDamage
from brainscale.stream import Stream

MAX_REPORT = 2000
"""Bytes of a report, so that it is written to the pipe in one piece (PIPE_BUF)."""
NARROWEST_BLUR_VOXELS = 1e-3
"""In place of no blur, which DALI's operator cannot be asked for."""


class Source:
    """A stateless function from the number of a sample to what the graph needs for it.

    Unpickled in a process, it makes the process deaf to signals (they go to the whole job, and a run saves itself
    before it ends), and lets it end with the run's process, however that ends.
    """

    def __init__(self, stream: Stream, cursor: int, names: tuple[str, ...], report: str) -> None:
        """cursor: global index from which the stream is read; names: which of the outputs are wanted; report: a named
        pipe that is told of damage, since DALI passes it on only when its batch's turn comes."""
        self.stream, self.cursor, self.names, self.report = stream, cursor, names, report

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        parent = multiprocessing.parent_process()
        if parent is not None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN)
            threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()

    def __call__(self, sample: Any) -> tuple[np.ndarray, ...]:
        """sample: DALI's SampleInfo. Raises StoreDamage with row and file, after reporting it with the sample."""
        stream = self.stream
        first = self.cursor + sample.iteration * stream.stride + stream.rank * stream.micro_batch
        index = first + sample.idx_in_batch
        try:
            outputs = self.outputs(index)
        except StoreDamage as error:
            with open(self.report, "wb", buffering=0) as pipe:
                pipe.write(f"{index} {error}".encode()[:MAX_REPORT] + b"\n")
            raise
        return tuple(outputs[name] for name in self.names)

    def outputs(self, index: int) -> dict[str, np.ndarray]:
        """All outputs for the sample at a global index."""
        reader, d = self.stream.reader, self.stream.draw(index)
        piece, change, code = reader.piece(d), d.change, reader.codes(d.row)
        sigma = np.maximum(augment.blur_voxels(change, reader.spacing_mm_zyx(d.row)), NARROWEST_BLUR_VOXELS)
        return {
            "voxels": piece.voxels[..., None],
            "foreground": piece.foreground,
            "start": np.array(piece.box.start_zyx, np.int32),
            "moves": np.array(change.moves),
            "matrix": matrix_xyz(piece.box),
            "mirrored": np.array(d.flip, np.int32),
            "background": np.array(code.background, np.float32),
            "low": np.array(code.low, np.float32),
            "span": np.array(code.high - code.low, np.float32),
            "alters": np.array(change.alters),
            "blurs": np.array(change.blur_mm > 0),
            "sigma": sigma.astype(np.float32),
            "window": np.array(2 * np.array(augment.blur_radius(sigma)) + 1, np.int32),
            "gamma": np.array(change.gamma, np.float32),
            "gain": np.array(change.gain, np.float32),
            "log_field": augment.log_field(change.bias)[..., None],
            "noise_std": np.array(change.noise_std, np.float32),
        }


def matrix_xyz(box: augment.Box) -> np.ndarray:
    """(3,4) float32 as warp_affine takes it: in x, y, z, and from corners of voxels in place of their middles."""
    offset = box.offset_zyx + 0.5 - box.linear_zyx @ np.full(3, 0.5)
    return np.concatenate([box.linear_zyx[::-1, ::-1], offset[::-1, None]], axis=1).astype(np.float32)


def _leave_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
