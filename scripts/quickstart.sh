#!/usr/bin/env bash
# Sets mmdiff up and makes one video and one sound from text with the weights that ship.
set -uo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/setup_env.sh"

case "${1:-}" in
    "") ;;
    -h | --help)
        cat <<'HELP'
usage: bash scripts/quickstart.sh

Makes .venv in the repository (Python 3.11 to 3.13; about 8 GB of free disk the first time), installs mmdiff
and writes one clip and one sound, each with a preview picture, to outputs/. A second run reuses .venv.

environment:
  PYTHON=/path/to/python3.11   the Python to use
  PIP_...                      as pip reads them. With PyTorch's index of CPU builds in PIP_EXTRA_INDEX_URL
                               the environment takes about 1.5 GB instead of 6
HELP
        exit 0
        ;;
    *) fail "unknown argument $1; see --help" ;;
esac

setup_env ""
cd "$ROOT" || exit 1

"$VENV_PYTHON" -m mmdiff txt2vid \
    "a character with tan skin and a blue topknot, wearing a chainmail shirt, steel leg armour and golden boots, walking to the left, on a grey background" \
    --out "$ROOT/outputs" --preview || exit $?
"$VENV_PYTHON" -m mmdiff txt2audio "the digit seven spoken by jackson" --out "$ROOT/outputs" --preview || exit $?
