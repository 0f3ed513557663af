"""`python -m lethe_compile` is `lethe`."""

from __future__ import annotations

import sys

from lethe_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
