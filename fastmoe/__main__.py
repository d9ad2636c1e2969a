"""`python -m fastmoe`."""

import sys

from fastmoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
