"""`python -m rankfold`, which `accelerate launch -m rankfold` needs."""

import sys

from rankfold.cli import main

if __name__ == "__main__":
    sys.exit(main())
