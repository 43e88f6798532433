#!/usr/bin/env bash
# Sets mmdiff up with what the tests need, then lints, checks types and runs the tests.
set -uo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/setup_env.sh"

case "${1:-}" in
    -h | --help)
        cat <<'HELP'
usage: bash scripts/test.sh [PYTEST ARGUMENTS]

Makes or completes .venv, then runs ruff, mypy and pytest. Arguments go to pytest:
  bash scripts/test.sh --slow               the slow tests too
  bash scripts/test.sh tests/test_sigmas.py one file
HELP
        exit 0
        ;;
esac

setup_env "test,text,decord,ray,tables"
cd "$ROOT" || exit 1

# k-diffusion, a reference of tests/test_sampling_kdiffusion.py, asks for clip, wandb and more that its samplers do not
# use; what they use is in the extra `test`. Where it cannot be had those tests are skipped.
"$VENV_PYTHON" -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("k_diffusion") is None)' ||
    "$VENV_PYTHON" -m pip install -q --no-deps -c "$ROOT/constraints.txt" k-diffusion ||
    echo "test.sh: k-diffusion could not be installed; the tests against it are skipped" >&2

"$VENV_PYTHON" -m ruff check . || fail "ruff check found the faults above; 'ruff check --fix .' mends some"
"$VENV_PYTHON" -m ruff format --check . || fail "the files above are not formatted; run 'ruff format .'"
"$VENV_PYTHON" -m mypy || fail "mypy found the faults above"
exec "$VENV_PYTHON" -m pytest -q -n auto --maxprocesses 4 --dist worksteal "$@"
