"""``python -m errata``: the command."""

import sys

from errata.cli import main

sys.exit(main())
