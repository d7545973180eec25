"""`python -m cbp_fast`, the same as the command `cbp-fast`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
