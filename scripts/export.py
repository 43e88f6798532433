"""`python scripts/export.py ...` is `mmdiff export ...`, also where mmdiff is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmdiff.__main__ import guarded
from mmdiff.export import main

if __name__ == "__main__":
    sys.exit(guarded("export", main, sys.argv[1:]))
