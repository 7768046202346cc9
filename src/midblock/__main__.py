"""`python -m midblock` is the `midblock` program."""

import sys

from midblock.cli.app import run

if __name__ == "__main__":
    sys.exit(run())
