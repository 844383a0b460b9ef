"""Ctrl-C at any moment of a pool's work: it ends, with its sentence, whatever the waiting thread was doing."""

import os
import random
import signal
import subprocess
import sys

import pytest
from conftest import FULL, ROOT

MANY = """
import sys
from brainscale_data_prep import pool
seen = []
def collect(result):
    if not seen:
        print("first", flush=True)
    seen.append(result)
    return 1
if __name__ == "__main__":
    try:
        pool.run(abs, range(3000), 1, collect, 3000)
    except pool.Stopped as stopped:
        print(stopped)
        sys.exit(75)
"""
"""So many small tasks that the waiting thread is nearly always taking or giving back the locks of futures."""


@pytest.mark.slow
def test_ctrl_c_ends_a_pool_at_any_moment(tmp_path):
    """An exception thrown at the waiting thread left a future locked, and hung about one run in ten of these."""
    script, rng = tmp_path / "many.py", random.Random(0)
    script.write_text(MANY)
    for _ in range(40 if FULL else 10):
        command = [sys.executable, str(script)]
        running = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True)
        assert running.stdout is not None and running.stdout.readline() == "first\n"
        try:
            running.wait(timeout=rng.random() * 0.05)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGINT)
        try:
            output, _ = running.communicate(timeout=60)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
        assert running.returncode == 75 and output.startswith("interrupted; what is finished is kept")
