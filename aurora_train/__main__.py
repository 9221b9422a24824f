"""`python -m aurora_train` is `aurora`."""

import sys

from aurora_train.cli.main import main

sys.exit(main())
