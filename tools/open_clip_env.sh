#!/bin/sh
# Makes the environment that runs stock open_clip as a reference: .cache/open_clip, or $QPERT_OPEN_CLIP_ENV. See
# environment.sh.
#
# torchvision's wheels are CUDA builds, whose operators do not load beside a CPU torch; only its transforms, which are
# plain Python, are used (exporter/families/coca/open_clip_worker.py imports them without the package's __init__).
# Pillow 12, because later ones resize tall pictures in another order than those that open_clip was trained with.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
title=open_clip env=${QPERT_OPEN_CLIP_ENV:-$root/.cache/open_clip}
. "$root/tools/environment.sh"

pins='torch==2.13.0 numpy==2.4.6 pillow==12.0.0 safetensors==0.8.0 regex==2026.11.19 ftfy==6.3.1 wcwidth==0.9.4
tqdm==4.70.1'
pins_alone='open_clip_torch==3.3.0 torchvision==0.28.0' # without their dependencies

needs_python 3.11
begin open-clip QPERT_OPEN_CLIP_ENV 'about a minute, 0.9 GB' "$pins" "$pins_alone"
# shellcheck disable=SC2086 # the pins are meant to split into words
install $pins
# shellcheck disable=SC2086
install --no-deps $pins_alone
"$env/bin/python" -I -W ignore "$root/exporter/families/coca/open_clip_worker.py" --check >&2
finish
