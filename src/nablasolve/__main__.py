"""`python -m nablasolve` runs the demo."""

import sys

from .demo import main

if __name__ == "__main__":
    sys.exit(main())
