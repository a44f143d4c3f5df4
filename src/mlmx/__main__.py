"""``python -m mlmx <command> [key=value ...]``."""

import sys

from mlmx.cli import main

if __name__ == "__main__":
    sys.exit(main())
