"""``python -m fusedres``: the command line."""

import sys

from fusedres.cli import main

sys.exit(main())
