#!/bin/sh
# Makes the environment with a real Triton server, for tests: .cache/triton, or $QPERT_TRITON_ENV. See environment.sh.
#
# NVIDIA's `nvidia-pytriton` carries tritonserver 2.51 with the python backend; it pins NumPy below 2, so it has an
# environment of its own. `backends/` in it is that backend with the stub of this Python. tests/triton_server.py starts
# the server.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
title=Triton env=${QPERT_TRITON_ENV:-$root/.cache/triton}
. "$root/tools/environment.sh"

# What the python backend runs of qpert, of the versions that it is tested with (constraints.txt), but for NumPy.
pins='nvidia-pytriton==0.7.0 tritonclient==2.73.0 numpy==1.26.4 onnxruntime==1.31.1 tokenizers==0.23.3 pillow==13.0.0
fastjsonschema==2.22.3 safetensors==0.8.0'

only_linux_x86_64 nvidia-pytriton
needs_python 3.10 3.13
begin triton QPERT_TRITON_ENV 'about a minute, 500 MB' "$pins"
# shellcheck disable=SC2086 # the pins are meant to split into words
install $pins
"$env/bin/python" - "$env/backends/python" <<'PY'
import importlib.util, pathlib, shutil, sys
server = pathlib.Path(importlib.util.find_spec("pytriton").origin).parent / "tritonserver"
target = pathlib.Path(sys.argv[1])
shutil.copytree(server / "backends" / "python", target)
stub = server / "python_backend_stubs" / "{}.{}".format(*sys.version_info) / "triton_python_backend_stub"
shutil.copy(stub, target)
(target / stub.name).chmod(0o755)
PY
finish
