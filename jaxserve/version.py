"""The version, in one place: the build reads it here, and so does `--version`."""

import time

__version__ = "0.1.0"
IMPORTED_AT_S = time.time()  # sources written later are not what this process runs
