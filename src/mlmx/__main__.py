"""``python -m mlmx <command> [key=value ...]``."""

import sys

from mlmx.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
