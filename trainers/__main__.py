"""`python -m aligngpt_trainers ...` is `aligngpt ...`: what `accelerate launch -m` and `torchrun -m` need."""

import sys

from .commands.cli import main


if __name__ == "__main__":
    sys.exit(main())
