"""`python -m metaalign_rl` is `metaalign-rl`."""

import sys

from metaalign_rl.cli.main import main

sys.exit(main())
