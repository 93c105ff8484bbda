#!/bin/sh
# Makes the environment that runs stock LAVIS as a reference: .cache/lavis, or $QPERT_LAVIS_ENV. See environment.sh.
#
# LAVIS 1.0.2 does not work with a current transformers, so it has an environment of its own. What else it depends on
# (torchvision, opencv, decord, spacy, ...) is for parts of it that are not used; exporter/families/blip2/lavis_worker.py
# stands in for them.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
title=LAVIS env=${QPERT_LAVIS_ENV:-$root/.cache/lavis}
. "$root/tools/environment.sh"

pins='torch==2.13.0 numpy==2.4.6 pandas==3.1.1 pillow==13.0.0 omegaconf==2.4.0 iopath==0.1.10
transformers==4.41.2 fairscale==0.4.4 safetensors==0.8.0'
pins_alone='timm==0.4.12 salesforce-lavis==1.0.2' # without their dependencies

needs_python 3.11
begin lavis QPERT_LAVIS_ENV 'about 90 s, 1.2 GB' "$pins" "$pins_alone"
# shellcheck disable=SC2086 # the pins are meant to split into words
install $pins
# shellcheck disable=SC2086
install --no-deps $pins_alone
"$env/bin/python" -I -W ignore "$root/exporter/families/blip2/lavis_worker.py" --check >&2
finish
