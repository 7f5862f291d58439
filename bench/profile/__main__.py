"""``python -m tcurlora_ext.bench.profile``."""

import sys

from .command import main

sys.exit(main())
