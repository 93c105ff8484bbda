#!/bin/sh
# Installs what the Node and browser examples need: their npm packages, as their package-lock.json names them, and Chromium.
#
#     sh tools/web_env.sh [--without-browser] [--if-possible]
#
# npm packages go to examples/node/node_modules and examples/web/node_modules (500 MB); Chromium comes from the system's
# packages, which takes root on Debian and its kin. Does nothing for what is there already. What cannot be had is said;
# with --if-possible that is no failure, and the tests that need it skip. No install script of a package is run:
# onnxruntime-node's would fetch CUDA libraries from elsewhere, and what runs on the CPU is in the package.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
missing=3
browser=${QPERT_CHROMIUM:-chromium}
for option in "$@"; do
    case $option in
    --if-possible) missing=0 ;;
    --without-browser) browser=true ;; # a command that is always there
    *) echo "unknown option $option" >&2 && exit 2 ;;
    esac
done

if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
    echo "Node is not here: the examples for Node and the browser need version 20 or later with npm" >&2
    exit $missing
fi
if [ "$(node -p 'process.versions.node.split(".")[0]')" -lt 20 ]; then
    echo "Node is $(node --version), expected 20 or later: the examples for Node and the browser cannot run" >&2
    exit $missing
fi
for folder in "$root/examples/node" "$root/examples/web"; do
    stamp=$folder/node_modules/.qpert
    if ! cmp -s "$folder/package-lock.json" "$stamp"; then
        echo "installing the npm packages of $folder" >&2
        if ! (cd "$folder" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error >&2); then
            echo "npm could not install them: is the registry reached?" >&2
            exit $missing
        fi
        cp "$folder/package-lock.json" "$stamp"
    fi
done
if ! command -v "$browser" >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing chromium (300 MB)" >&2
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq >&2
        apt-get install -y -qq -o DPkg::Lock::Timeout=300 --no-install-recommends chromium >/dev/null
    else
        echo "no chromium here: install it, or name one in QPERT_CHROMIUM; the browser tests need it" >&2
        exit $missing
    fi
fi
echo "the Node and browser examples have what they need" >&2
