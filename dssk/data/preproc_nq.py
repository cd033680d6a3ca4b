"""`dssk preproc`, run as a file: `python preproc_nq.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a file it finds its own folder only, not the package
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dssk.commands.preproc import main
from dssk.errors import exit_code_of

if __name__ == "__main__":
    sys.exit(exit_code_of(main))
