"""`python scripts/encode.py ...` is `mmdiff encode ...`, also where mmdiff is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmdiff.__main__ import guarded
from mmdiff.encode import main

if __name__ == "__main__":
    sys.exit(guarded("encode", main, sys.argv[1:]))
