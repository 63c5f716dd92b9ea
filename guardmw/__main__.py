"""``python -m guardmw`` is ``guardmw``."""

import sys

from guardmw.cli import main

if __name__ == "__main__":
    sys.exit(main())
