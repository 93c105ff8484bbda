#!/bin/sh
# Do the lower bounds in pyproject.toml hold? Exports, verifies, indexes and searches with the lowest versions they allow.
#
# Two environments in .cache/lowest (or $QPERT_LOWEST_ENV), made by uv with --resolution lowest-direct:
#   export    qpert[cpu,export,hf] on $PYTHON (default python3)
#   runtime   qpert[cpu] on Python 3.10, the lowest that qpert allows; on $PYTHON where there is no 3.10
# torch is the exception: PyPI has its lowest version only with several gigabytes of CUDA, so the pin of constraints.txt
# stands in. (torch 2.10.0 was tried by hand with everything else lowest, and did all of this.)
# Environments that were made from the same pyproject.toml are used again.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
home=${QPERT_LOWEST_ENV:-$root/.cache/lowest}
python=${PYTHON:-python3}
torch=$(grep '^torch==' "$root/constraints.txt")
stamp=$home/qpert-lowest.stamp

wanted=$("$python" - "$root/pyproject.toml" "$root/tools/check_lowest.sh" "$torch" <<'PY'
import hashlib, pathlib, sys
files = [pathlib.Path(name).read_text(encoding="utf-8") for name in sys.argv[1:3]]
print(hashlib.sha256("\n".join([*files, sys.argv[3], sys.version]).encode()).hexdigest())
PY
)

lowest_python() {
    for candidate in python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python3.10; do
        if "$candidate" -c '' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    echo "no Python 3.10 here: the runtime is tried on $python" >&2
    command -v "$python"
}

make_environments() {
    if [ -e "$home" ] && [ ! -d "$home/tools" ] && [ -n "$(ls -A "$home")" ]; then
        echo "$home is not ours to replace: move it away, or set QPERT_LOWEST_ENV to another place" >&2
        exit 2
    fi
    echo "making the environments of the lowest versions in $home (some minutes, 1.5 GB)" >&2
    rm -rf "$home"
    mkdir -p "$home"
    "$python" -m venv "$home/tools"
    "$home/tools/bin/python" -m pip install --quiet --disable-pip-version-check uv
    uv=$home/tools/bin/uv
    "$python" -m venv "$home/export"
    "$home/export/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" # pip finds the CPU build
    echo "$torch" > "$home/torch.txt"
    "$uv" pip install --quiet --python "$home/export/bin/python" --resolution lowest-direct \
        --override "$home/torch.txt" --editable "$root[cpu,export,hf]"
    "$uv" venv --quiet --python "$(lowest_python)" "$home/runtime"
    "$uv" pip install --quiet --python "$home/runtime/bin/python" --resolution lowest-direct --editable "$root[cpu]"
    echo "$wanted" > "$stamp.part"
    mv "$stamp.part" "$stamp"
}

versions() {
    echo "$1: $("$home/$1/bin/python" --version)"
    "$home/tools/bin/uv" pip list --quiet --python "$home/$1/bin/python" --format freeze |
        grep -E '^(torch|numpy|onnx|onnxruntime|onnxscript|onnx-graphsurgeon|pillow|tokenizers|transformers|huggingface-hub|safetensors|click|rich)==' |
        tr '\n' ' '
    echo
}

if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    make_environments
fi
versions export
versions runtime

run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
photos=$root/examples/photos
cd "$run"
export HF_HUB_OFFLINE=1
"$home/export/bin/qpert" export blip2 --out bundle --json > bundle.json
"$home/export/bin/python" -m json.tool bundle.json > manifest.json # standard output is one document
"$home/export/bin/qpert" verify bundle
"$home/export/bin/qpert" verify bundle --reference hf
"$home/runtime/bin/qpert" verify bundle
"$home/runtime/bin/qpert" index bundle "$photos" --out gallery --boxes "$photos/boxes.jsonl"
"$home/runtime/bin/qpert" search gallery "a small cup on a table" --json > hits.json
"$home/runtime/bin/python" - "$photos" <<'PY'
import json, pathlib, sys
photos = {path.name for path in pathlib.Path(sys.argv[1]).glob("*.jpg")}
hits = {hit["image"] for hit in json.load(open("hits.json"))["hits"]}
sys.exit(0 if hits == photos else f"the search found {sorted(hits)}, expected {sorted(photos)}")
PY
echo "the lower bounds hold: exported, verified, indexed and searched with the versions above"
