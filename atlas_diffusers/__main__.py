"""``python -m atlas_diffusers``: the command line."""

import sys

from .cli import main

sys.exit(main())
