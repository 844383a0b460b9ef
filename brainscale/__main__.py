"""`python -m brainscale` and `torchrun -m brainscale`."""

from brainscale.cli import main

if __name__ == "__main__":
    main()
