#!/bin/sh
# Makes the environment in which NVIDIA ModelOpt quantises for TensorRT: .cache/modelopt, or $QPERT_MODELOPT_ENV.
#
# ModelOpt 0.47 pins onnx 1.21 and onnxruntime-gpu 1.24 and installs CuPy, none of which agrees with what qpert uses, so
# it lives apart; `qpert quantize --target tensorrt` calls it as a process. It needs no GPU.
# Does nothing when the environment was made with the same pins; an interrupted run leaves no stamp and starts again.
# PYTHON chooses the interpreter that it is made with (default python3).
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
env=${QPERT_MODELOPT_ENV:-$root/.cache/modelopt}
python=${PYTHON:-python3}
stamp=$env/qpert-modelopt.stamp

pins='torch==2.13.0 nvidia-modelopt[onnx]==0.47.0'

wanted=$("$python" - "$pins" <<'PY'
import hashlib, sys
if sys.version_info < (3, 11):
    sys.exit(f"the ModelOpt environment needs Python 3.11 or later, got {sys.version.split()[0]}: set PYTHON=python3.11")
print(hashlib.sha256("\n".join([*sys.argv[1:], sys.version]).encode()).hexdigest())
PY
)

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "ModelOpt environment is up to date: $env" >&2
    exit 0
fi
if [ -e "$env" ] && [ ! -f "$env/pyvenv.cfg" ] && [ -n "$(ls -A "$env")" ]; then
    echo "$env is not a virtual environment: move it away, or set QPERT_MODELOPT_ENV to another place" >&2
    exit 2
fi

echo "making the ModelOpt environment in $env (some minutes, 3 GB)" >&2
rm -rf "$env"
mkdir -p "$(dirname -- "$env")"
"$python" -m venv --without-pip "$env" # Debian's Python has no ensurepip; the pip that is there serves both
# shellcheck disable=SC2086 # the pins are meant to split into words
"$python" -m pip --python "$env/bin/python" --disable-pip-version-check install --quiet $pins
"$env/bin/python" -I -W ignore -c 'import modelopt.onnx.quantization' >&2
echo "$wanted" > "$stamp.part"
mv "$stamp.part" "$stamp"
echo "ModelOpt environment is ready: $env" >&2
