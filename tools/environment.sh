# Sourced by the scripts that make an environment of its own for a stock implementation or an engine:
#
#   needs_python LOWEST [HIGHEST]   exits with 1 where PYTHON is another
#   only_linux_x86_64 WHAT          elsewhere says so and exits with 0: the tests that need it skip
#   begin KEY VARIABLE COST PINS…   exits with 0 where the environment was made with the same pins; else makes it, empty
#   install PIN…                    puts packages into it
#   finish                          marks it as complete
#
# `title` names the environment in messages and `env` is its folder. An interrupted run leaves no stamp and starts again.
# PYTHON chooses the interpreter that it is made with (default python3).
# shellcheck shell=sh disable=SC2154 # root, title and env are the caller's

python=${PYTHON:-python3}

needs_python() {
    "$python" - "$title" "$1" "${2:-99.0}" <<'PY'
import sys
title, lowest, highest = sys.argv[1], *(tuple(map(int, version.split("."))) for version in sys.argv[2:])
if not lowest <= sys.version_info[:2] <= highest:
    wanted = f"{sys.argv[2]} or later" if highest[0] == 99 else f"{sys.argv[2]} to {sys.argv[3]}"
    sys.exit(f"the {title} environment needs Python {wanted}, got {sys.version.split()[0]}: set PYTHON=python3.11")
PY
}

only_linux_x86_64() {
    if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
        echo "$1 is for Linux on x86-64, this is $(uname -s) on $(uname -m): the $title environment is not made" >&2
        exit 0
    fi
}

begin() {
    stamp=$env/qpert-$1.stamp variable=$2 cost=$3
    shift 3
    wanted=$("$python" -c 'import hashlib, sys
print(hashlib.sha256("\n".join([*sys.argv[1:], sys.version]).encode()).hexdigest())' "$@")
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        echo "$title environment is up to date: $env" >&2
        exit 0
    fi
    if [ -e "$env" ] && [ ! -f "$env/pyvenv.cfg" ] && [ -n "$(ls -A "$env")" ]; then
        echo "$env is not a virtual environment: move it away, or set $variable to another place" >&2
        exit 2
    fi
    echo "making the $title environment in $env ($cost)" >&2
    rm -rf "$env"
    mkdir -p "$(dirname -- "$env")"
    "$python" -m venv --without-pip "$env" # Debian's Python has no ensurepip; the pip that is there serves both
}

install() {
    "$python" -m pip --python "$env/bin/python" --disable-pip-version-check install --quiet "$@"
}

finish() {
    echo "$wanted" > "$stamp.part"
    mv "$stamp.part" "$stamp"
    echo "$title environment is ready: $env" >&2
}
