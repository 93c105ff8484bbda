#!/bin/sh
# Makes the environment that runs stock LAVIS as a reference: .cache/lavis, or $QPERT_LAVIS_ENV.
#
# LAVIS 1.0.2 does not work with a current transformers, so it lives apart from qpert. What else it depends on
# (torchvision, opencv, decord, spacy, ...) serves parts of it that are not used; exporter/families/blip2/lavis_worker.py stands in.
# Does nothing when the environment was made with the same pins; an interrupted run leaves no stamp and starts again.
# PYTHON chooses the interpreter that it is made with (default python3).
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
env=${QPERT_LAVIS_ENV:-$root/.cache/lavis}
python=${PYTHON:-python3}
stamp=$env/qpert-lavis.stamp

pins='torch==2.13.0 numpy==2.4.6 pandas==3.1.1 pillow==13.0.0 omegaconf==2.4.0 iopath==0.1.10
transformers==4.41.2 fairscale==0.4.4 safetensors==0.8.0'
pins_alone='timm==0.4.12 salesforce-lavis==1.0.2' # without their dependencies

wanted=$("$python" - "$pins" "$pins_alone" <<'PY'
import hashlib, sys
if sys.version_info < (3, 11):
    sys.exit(f"the LAVIS environment needs Python 3.11 or later, got {sys.version.split()[0]}: set PYTHON=python3.11")
print(hashlib.sha256("\n".join([*sys.argv[1:], sys.version]).encode()).hexdigest())
PY
)

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "LAVIS environment is up to date: $env" >&2
    exit 0
fi
if [ -e "$env" ] && [ ! -f "$env/pyvenv.cfg" ] && [ -n "$(ls -A "$env")" ]; then
    echo "$env is not a virtual environment: move it away, or set QPERT_LAVIS_ENV to another place" >&2
    exit 2
fi

echo "making the LAVIS environment in $env (about 90 s, 1.2 GB)" >&2
rm -rf "$env"
mkdir -p "$(dirname -- "$env")"
"$python" -m venv --without-pip "$env" # Debian's Python has no ensurepip; the pip that is there serves both
install() {
    "$python" -m pip --python "$env/bin/python" --disable-pip-version-check install --quiet "$@"
}
# shellcheck disable=SC2086 # the pins are meant to split into words
install $pins
# shellcheck disable=SC2086
install --no-deps $pins_alone
"$env/bin/python" -I -W ignore "$root/exporter/families/blip2/lavis_worker.py" --check >&2
echo "$wanted" > "$stamp.part"
mv "$stamp.part" "$stamp"
echo "LAVIS environment is ready: $env" >&2
