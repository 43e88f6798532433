"""`python scripts/txt2vid.py ...` is `mmdiff txt2vid ...`, also where mmdiff is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmdiff.__main__ import guarded
from video.commands import txt2vid

if __name__ == "__main__":
    sys.exit(guarded("txt2vid", txt2vid, sys.argv[1:]))
