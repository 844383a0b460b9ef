"""`python -m brainscale` and `torchrun -m brainscale`."""

import signal
import sys

if sys.argv[1:2] == ["pretrain"]:  # a signal that comes while all is imported waits until the run looks (stopping.py)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM))

from brainscale.cli import main

if __name__ == "__main__":
    main()
