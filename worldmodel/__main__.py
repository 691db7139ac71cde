"""`python -m worldmodel` is the command `worldmodel`."""

import sys

from worldmodel.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
