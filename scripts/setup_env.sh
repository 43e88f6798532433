# Makes or reuses .venv. Sourced by quickstart.sh and test.sh, which then call `setup_env EXTRAS`; runs on bash 3.2.
#
# After it, $ROOT is the repository and $VENV_PYTHON the interpreter to run.
# A file in .venv, the stamp, holds what was installed; without it .venv counts as unfinished. Environment:
#   PYTHON            the interpreter to make .venv with; else python3.13, 3.12, 3.11 and python3 are tried
#   MMDIFF_NEEDED_MB  free disk space asked for before a first installation
#   PIP_*             as pip reads them, e.g. PIP_INDEX_URL for a mirror

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
STAMP="$VENV/mmdiff-stamp"
UNFINISHED="$VENV/mmdiff-unfinished"
INSTALL_LOG="$VENV/install.log"

# Modules from outside .venv would shadow its own.
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# Prints "3.12" if the command runs and is Python, nothing if not (a pyenv shim may exist and yet not run).
python_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# Sets $FOUND_PYTHON, or ends with one line that says what was found instead.
find_python() {
    local candidates candidate version found="" without_venv=""
    candidates="python3.13 python3.12 python3.11 python3"
    if [ -n "${PYTHON:-}" ]; then
        [ -n "$(python_version "$PYTHON")" ] || fail "PYTHON=$PYTHON does not run; name Python 3.11, 3.12 or 3.13"
        candidates=""
    fi
    while IFS= read -r candidate; do
        [ -n "$candidate" ] || continue
        version="$(python_version "$candidate")"
        case "$version" in
            "") continue ;;
            3.11 | 3.12 | 3.13) ;;
            *) found="$found${found:+, }$candidate is $version"; continue ;;
        esac
        if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            FOUND_PYTHON="$candidate"
            return
        fi
        without_venv="$candidate is $version"
    done <<CANDIDATES
${PYTHON:-}
$(printf '%s\n' $candidates)
CANDIDATES
    if [ -n "$without_venv" ]; then
        fail "$without_venv but has no venv module; install it (Debian, Ubuntu: python3-venv) or set PYTHON=/path/to/python3.11"
    fi
    fail "needs Python 3.11, 3.12 or 3.13 (found: ${found:-no Python that runs}); install one or set PYTHON=/path/to/python3.11"
}

# needed MB. The CUDA build of torch is most of it; its wheels lie beside the unpacked files for a while.
check_disk() {
    local needed="${MMDIFF_NEEDED_MB:-$1}" free
    free="$(df -Pk "$ROOT" 2>/dev/null | awk 'NR == 2 { print int($4 / 1024) }')"
    if [ -n "$free" ] && [ "$free" -lt "$needed" ]; then
        fail "needs $needed MB of free disk for .venv, $ROOT has $free MB; free some space and run again"
    fi
}

# What the stamp must hold for this tree. A moved or copied folder needs its .venv made anew: paths are written in it.
wanted_stamp() {
    "$1" - "$ROOT" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(str(root).encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

# Are all of "a,b" ($1) among "a,b,c" ($2)?
is_subset() {
    local extra IFS=,
    for extra in $1; do
        case ",$2," in *",$extra,"*) ;; *) return 1 ;; esac
    done
}

# "a,b" and "b,c" -> "a,b,c"
union() {
    printf '%s\n' "$1" "$2" | tr ',' '\n' | sed '/^$/d' | sort -u | paste -sd, -
}

# Finds the packages without importing them, from a folder that holds none of ours.
packages_present() {
    (cd "$VENV" && "$VENV_PYTHON" - "$1" <<'PYTHON'
import sys
from importlib.util import find_spec
names = ["mmdiff", "video", "audio", "audiovideo", "torch", "torchaudio", "lightning", "av", "soundfile", "safetensors"]
names += ["pytest", "ruff", "mypy", "diffusers", "librosa"] if "test" in sys.argv[1].split(",") else []
sys.exit(any(find_spec(name) is None for name in names))
PYTHON
    ) >/dev/null 2>&1
}

# Runs a command into the log, with a line that lives on a terminal and one every half minute elsewhere.
run_logged() {
    local pid rc start=$SECONDS last="" now shown=0 interval=30
    [ -t 1 ] && [ -z "${CI:-}" ] && interval=1
    "$@" >>"$INSTALL_LOG" 2>&1 &
    pid=$!
    # A background command ignores Ctrl-C in a script, so it is ended by hand.
    trap 'kill "$pid" 2>/dev/null; echo; fail "interrupted; run it again to start over"' INT TERM HUP
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.1
        now=$((SECONDS - start))
        [ $((now - shown)) -ge "$interval" ] || continue
        shown=$now
        last="$(grep -E '^ *(Collecting|Downloading|Using cached|Processing|Installing|Building|Preparing)' "$INSTALL_LOG" |
            tail -n 1 | sed 's/^ *//; s/Installing collected packages.*/Installing the packages/' | cut -c 1-60)"
        if [ "$interval" -eq 1 ]; then
            printf '\r\033[K  %4d s  %s' "$now" "$last"
        else
            printf '  %4d s  %s\n' "$now" "$last"
        fi
    done
    [ "$interval" -eq 1 ] && printf '\r\033[K'
    wait "$pid"
    rc=$?
    trap - INT TERM HUP
    return $rc
}

no_network() {
    grep -qE 'NewConnectionError|NameResolutionError|Temporary failure in name resolution|Name or service not known|nodename nor servname|Network is unreachable|No route to host|Connection refused|ConnectTimeout|ReadTimeout|Max retries exceeded|ProxyError' "$INSTALL_LOG"
}

# One line on why pip ended, from its log.
fail_install() {
    local cause
    if grep -qE 'No space left on device|Errno 28|Disk quota exceeded' "$INSTALL_LOG"; then
        fail "the disk is full; free about ${MMDIFF_NEEDED_MB:-8000} MB and run again (log: $INSTALL_LOG)"
    fi
    if no_network; then
        fail "the network or the package index cannot be reached; check the connection and run again (log: $INSTALL_LOG)"
    fi
    cause="$(grep -E '^ *(ERROR|error|fatal)' "$INSTALL_LOG" | head -n 1 | cut -c 1-200)"
    fail "the installation failed: ${cause:-no reason given} (log: $INSTALL_LOG)"
}

install_packages() {
    local extras="$1" target="$ROOT"
    [ -n "$extras" ] && target="$ROOT[$extras]"
    : >"$INSTALL_LOG"
    # One disk holds all of it, so that check_disk means something and a small /tmp does not matter.
    mkdir -p "$VENV/tmp"
    "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || "$VENV_PYTHON" -m ensurepip >>"$INSTALL_LOG" 2>&1
    # The pip inside a new .venv is as old as its Python; the constraints name one without known holes. A mirror
    # may lack it and have all else, so only an index out of reach ends the installation here.
    TMPDIR="${TMPDIR:-$VENV/tmp}" run_logged "$VENV_PYTHON" -m pip install -c "$ROOT/constraints.txt" pip ||
        { no_network && fail_install; : >"$INSTALL_LOG"; }
    TMPDIR="${TMPDIR:-$VENV/tmp}" run_logged "$VENV_PYTHON" -m pip install -c "$ROOT/constraints.txt" -e "$target" ||
        fail_install
    rm -rf "$VENV/tmp"
    (cd "$VENV" && "$VENV_PYTHON" -c 'import torch, torchaudio, av, soundfile') >>"$INSTALL_LOG" 2>&1 ||
        fail "what was installed does not import: $(tail -n 1 "$INSTALL_LOG" | cut -c 1-200) (log: $INSTALL_LOG)"
}

# setup_env "test,text": .venv with mmdiff, editable, and these extras; extras already there are kept.
setup_env() {
    local extras="$1" have_hash="" have_extras="" hash
    if [ -n "$(python_version "$VENV_PYTHON")" ] && [ -f "$STAMP" ]; then
        { read -r have_hash && read -r have_extras; } <"$STAMP"
        hash="$(wanted_stamp "$VENV_PYTHON")"
        if [ "$hash" = "$have_hash" ] && is_subset "$extras" "$have_extras" && packages_present "$extras"; then
            echo "Using the environment in $VENV"
            return
        fi
    fi

    # Unfinished, or its Python is gone: a new one is surer than mending it. One that someone else made is only added to.
    if [ -f "$UNFINISHED" ] || { [ -e "$VENV" ] && [ -z "$(python_version "$VENV_PYTHON")" ]; }; then
        echo "The environment in $VENV is not complete; making it anew"
        rm -rf "$VENV"
    fi
    case "$(python_version "$VENV_PYTHON")" in
        3.11 | 3.12 | 3.13) check_disk 1000 ;;
        "")
            find_python
            check_disk 8000
            echo "Making $VENV with Python $(python_version "$FOUND_PYTHON")"
            mkdir -p "$VENV" && : >"$UNFINISHED" && "$FOUND_PYTHON" -m venv "$VENV" >"$INSTALL_LOG" 2>&1 || fail_install
            ;;
        *) fail "$VENV holds Python $(python_version "$VENV_PYTHON"), needed is 3.11, 3.12 or 3.13; delete that folder and run again" ;;
    esac

    extras="$(union "$extras" "$have_extras")"
    rm -f "$STAMP"
    echo "Installing mmdiff${extras:+ with $extras}; the first time takes some minutes and, with torch's CUDA libraries, 6 GB"
    install_packages "$extras"
    printf '%s\n%s\n' "$(wanted_stamp "$VENV_PYTHON")" "$extras" >"$STAMP.part"
    mv "$STAMP.part" "$STAMP"
    rm -f "$UNFINISHED"
}
