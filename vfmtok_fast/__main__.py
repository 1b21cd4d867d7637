"""``python -m vfmtok_fast`` runs the command line `vfmtok-fast`."""

import sys

from vfmtok_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
