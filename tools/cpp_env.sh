#!/bin/sh
# Sets up what examples/cpp is built with: a compiler, CMake, libjpeg-turbo, libpng, nlohmann-json, utf8proc, Oniguruma and
# OpenSSL from Debian or Ubuntu, and ONNX Runtime's headers in .cache/onnxruntime-headers (or $QPERT_ORT_HEADERS).
#
# The headers are those of Debian 13's libonnxruntime-dev (API 21), only unpacked: Python and npm packages have none. The
# library itself is opened when the program runs, so any ONNX Runtime from 1.21 on will do.
# Does nothing where all is there. What is missing and cannot be installed (no root, no apt-get, no network) is named on
# stderr, and the exit code stays 0: the tests of examples/cpp then skip. With --check nothing is installed or fetched;
# what is missing is printed, and the exit code is 1 where anything is.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
headers=${QPERT_ORT_HEADERS:-$root/.cache/onnxruntime-headers}
archive=https://deb.debian.org/debian/pool/main/o/onnxruntime/libonnxruntime-dev_1.21.0+dfsg-1_amd64.deb
sha256=14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08

has() { command -v "$1" >/dev/null 2>&1; }

missing=''
need() { missing="$missing $1"; }
has cmake || need cmake
has make || need make
has c++ || has g++ || has clang++ || need g++
header() { # header file, package
    for folder in /usr/include /usr/local/include /usr/include/"$(uname -m)"-linux-gnu /opt/homebrew/include; do
        if [ -e "$folder/$1" ]; then return; fi
    done
    need "$2"
}
header jpeglib.h libjpeg-dev
header png.h libpng-dev
header nlohmann/json.hpp nlohmann-json3-dev
header utf8proc.h libutf8proc-dev
header oniguruma.h libonig-dev
header openssl/evp.h libssl-dev

if [ "${1:-}" = --check ]; then
    [ -e "$headers/onnxruntime_cxx_api.h" ] || need "ONNX-Runtime's-headers"
    [ -z "$missing" ] && exit 0
    echo "missing:$missing; run \`make test-cpp\`"
    exit 1
fi

if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && has apt-get; then
        echo "installing$missing" >&2
        export DEBIAN_FRONTEND=noninteractive
        log=$(mktemp)
        # shellcheck disable=SC2086 # the packages are meant to split into words
        install() { apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 $missing; }
        if ! { install || { apt-get update && install; }; } >"$log" 2>&1; then
            tail -n 5 "$log" >&2
            echo "apt-get could not install$missing; examples/cpp cannot be built here" >&2
        fi
        rm -f "$log"
    else
        echo "examples/cpp cannot be built here: install$missing (as root: apt-get install$missing)" >&2
    fi
fi

if [ -e "$headers/onnxruntime_cxx_api.h" ]; then exit 0; fi
if ! has dpkg-deb || ! has curl || ! has sha256sum; then
    echo "ONNX Runtime's headers cannot be unpacked without dpkg-deb, curl and sha256sum; put them into $headers" >&2
    exit 0
fi
part=$headers.part
rm -rf "$part"
mkdir -p "$part"
if ! curl -fsSL --retry 3 -o "$part/package.deb" "$archive"; then
    echo "ONNX Runtime's headers cannot be fetched from $archive; put them into $headers" >&2
    rm -rf "$part"
    exit 0
fi
if ! echo "$sha256  $part/package.deb" | sha256sum --check --status; then
    echo "$archive has another SHA-256 than $sha256: not used" >&2
    rm -rf "$part"
    exit 2
fi
dpkg-deb -x "$part/package.deb" "$part/unpacked"
rm -rf "$headers"
mv "$part/unpacked/usr/include/onnxruntime" "$headers"
rm -rf "$part"
echo "ONNX Runtime's headers are in $headers" >&2
