#!/bin/sh
# Makes the environment that runs stock open_clip as a reference: .cache/open_clip, or $QPERT_OPEN_CLIP_ENV.
#
# torchvision's wheels are CUDA builds, whose operators do not load beside a CPU torch; only its transforms, which are
# plain Python, are used (exporter/families/coca/open_clip_worker.py imports them without the package's __init__).
# Pillow 12, because later ones resize tall pictures in another order than those that open_clip was trained with.
# Does nothing when the environment was made with the same pins; an interrupted run leaves no stamp and starts again.
# PYTHON chooses the interpreter that it is made with (default python3).
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
env=${QPERT_OPEN_CLIP_ENV:-$root/.cache/open_clip}
python=${PYTHON:-python3}
stamp=$env/qpert-open-clip.stamp

pins='torch==2.13.0 numpy==2.4.6 pillow==12.0.0 safetensors==0.8.0 regex==2026.11.19 ftfy==6.3.1 wcwidth==0.9.4
tqdm==4.70.1'
pins_alone='open_clip_torch==3.3.0 torchvision==0.28.0' # without their dependencies

wanted=$("$python" - "$pins" "$pins_alone" <<'PY'
import hashlib, sys
if sys.version_info < (3, 11):
    sys.exit(f"the open_clip environment needs Python 3.11 or later, got {sys.version.split()[0]}: set PYTHON=python3.11")
print(hashlib.sha256("\n".join([*sys.argv[1:], sys.version]).encode()).hexdigest())
PY
)

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "open_clip environment is up to date: $env" >&2
    exit 0
fi
if [ -e "$env" ] && [ ! -f "$env/pyvenv.cfg" ] && [ -n "$(ls -A "$env")" ]; then
    echo "$env is not a virtual environment: move it away, or set QPERT_OPEN_CLIP_ENV to another place" >&2
    exit 2
fi

echo "making the open_clip environment in $env (about a minute, 0.9 GB)" >&2
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
"$env/bin/python" -I -W ignore "$root/exporter/families/coca/open_clip_worker.py" --check >&2
echo "$wanted" > "$stamp.part"
mv "$stamp.part" "$stamp"
echo "open_clip environment is ready: $env" >&2
