"""`python scripts/txt2audio.py ...` is `mmdiff txt2audio ...`, also where mmdiff is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from audio.commands import txt2audio
from mmdiff.__main__ import guarded

if __name__ == "__main__":
    sys.exit(guarded("txt2audio", txt2audio, sys.argv[1:]))
