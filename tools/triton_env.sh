#!/bin/sh
# Makes the environment with a real Triton server, for tests: .cache/triton, or $QPERT_TRITON_ENV.
#
# NVIDIA's `nvidia-pytriton` carries tritonserver 2.51 with the python backend; it pins NumPy below 2, so it lives apart.
# `backends/` beside it is that backend with the stub of this Python. tests/triton_server.py starts the server.
# Does nothing when the environment was made with the same pins; an interrupted run leaves no stamp and starts again.
# PYTHON chooses the interpreter that it is made with (default python3).
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
env=${QPERT_TRITON_ENV:-$root/.cache/triton}
python=${PYTHON:-python3}
stamp=$env/qpert-triton.stamp

# What the python backend runs of qpert, of the versions that it is tested with (constraints.txt), but for NumPy.
pins='nvidia-pytriton==0.7.0 tritonclient==2.73.0 numpy==1.26.4 onnxruntime==1.31.1 tokenizers==0.23.3 pillow==13.0.0 fastjsonschema==2.22.3
safetensors==0.8.0'

wanted=$("$python" - "$pins" <<'PY'
import hashlib, platform, sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"the Triton environment needs Python 3.10 to 3.13, got {sys.version.split()[0]}: set PYTHON=python3.11")
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    sys.exit(f"nvidia-pytriton is for Linux on x86-64, this is {platform.system()} on {platform.machine()}")
print(hashlib.sha256("\n".join([*sys.argv[1:], sys.version]).encode()).hexdigest())
PY
)

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "Triton environment is up to date: $env" >&2
    exit 0
fi
if [ -e "$env" ] && [ ! -f "$env/pyvenv.cfg" ] && [ -n "$(ls -A "$env")" ]; then
    echo "$env is not a virtual environment: move it away, or set QPERT_TRITON_ENV to another place" >&2
    exit 2
fi

echo "making the Triton environment in $env (about a minute, 500 MB)" >&2
rm -rf "$env"
mkdir -p "$(dirname -- "$env")"
"$python" -m venv --without-pip "$env" # Debian's Python has no ensurepip; the pip that is there serves both
# shellcheck disable=SC2086 # the pins are meant to split into words
"$python" -m pip --python "$env/bin/python" --disable-pip-version-check install --quiet $pins
"$env/bin/python" - "$env/backends/python" <<'PY'
import importlib.util, pathlib, shutil, sys
server = pathlib.Path(importlib.util.find_spec("pytriton").origin).parent / "tritonserver"
target = pathlib.Path(sys.argv[1])
shutil.copytree(server / "backends" / "python", target)
stub = server / "python_backend_stubs" / "{}.{}".format(*sys.version_info) / "triton_python_backend_stub"
shutil.copy(stub, target)
(target / stub.name).chmod(0o755)
PY
echo "$wanted" > "$stamp.part"
mv "$stamp.part" "$stamp"
echo "Triton environment is ready: $env" >&2
