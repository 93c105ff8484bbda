#!/bin/sh
# NVIDIA's Python bindings of several TensorRTs, for tests of what qpert calls: .cache/trt-bindings, or
# $QPERT_TRT_BINDINGS. One folder a version, to be put on PYTHONPATH, and `stubs` for LD_LIBRARY_PATH.
#
# TensorRT itself is in none of the package registries and would need a GPU. The bindings are there, and are what Python
# code calls: they import with libraries that only export the names they link to (tools/trt_stubs.c).
# Does nothing when it was made with the same pins; an interrupted run leaves no stamp and starts again. Makes nothing,
# and says so, where NVIDIA publishes no bindings or no C compiler is there: the tests then skip.
# PYTHON chooses the interpreter, which must be the one that runs the tests (default python3).
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
home=${QPERT_TRT_BINDINGS:-$root/.cache/trt-bindings}
python=${PYTHON:-python3}
stamp=$home/qpert-trt-bindings.stamp

# 10.3 is JetPack 6's, 10.13 JetPack 7.1's, 10.16 JetPack 7.2's; 11.4 is the newest.
pins='tensorrt-cu12-bindings==10.3.0
tensorrt-cu12-bindings==10.13.3.9.post1
tensorrt-cu12-bindings==10.16.1.11
tensorrt-cu13-bindings==11.4.0.106'

case $(uname -s)-$(uname -m) in
    Linux-x86_64) ;;
    *) echo "NVIDIA's bindings are tried on Linux x86_64 only: not made here" >&2; exit 0 ;;
esac
if ! command -v "${CC:-cc}" > /dev/null; then
    echo "no C compiler for the stubs of NVIDIA's libraries: bindings not made" >&2
    exit 0
fi

wanted=$("$python" - "$pins" "$root/tools/trt_stubs.c" <<'PY'
import hashlib, pathlib, sys
print(hashlib.sha256("\n".join([sys.argv[1], pathlib.Path(sys.argv[2]).read_text(), sys.version]).encode()).hexdigest())
PY
)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "NVIDIA's bindings are up to date: $home" >&2
    exit 0
fi
if [ -e "$home" ] && [ ! -d "$home/stubs" ] && [ -n "$(ls -A "$home")" ]; then
    echo "$home is not ours to replace: move it away, or set QPERT_TRT_BINDINGS to another place" >&2
    exit 2
fi

echo "installing NVIDIA's TensorRT bindings into $home (about 20 MB)" >&2
rm -rf "$home"
mkdir -p "$home/stubs"
for major in 10 11; do
    for library in nvinfer nvinfer_plugin nvonnxparser; do
        "${CC:-cc}" -shared -fPIC -Wl,-soname,"lib$library.so.$major" -o "$home/stubs/lib$library.so.$major" \
            "$root/tools/trt_stubs.c"
    done
done
for pin in $pins; do
    version=${pin##*==}
    if ! "$python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$home/$version" "$pin"; then
        echo "$pin has no wheel for $("$python" --version): bindings not made, set PYTHON to a Python from 3.10 to 3.12" >&2
        exit 0
    fi
    LD_LIBRARY_PATH=$home/stubs PYTHONPATH=$home/$version "$python" -c 'import tensorrt_bindings'
done
echo "$wanted" > "$stamp.part"
mv "$stamp.part" "$stamp"
echo "NVIDIA's bindings are ready: $home" >&2
