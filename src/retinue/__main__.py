"""`python -m retinue` is the command line."""

import sys

from retinue.cli.main import main

sys.exit(main())
