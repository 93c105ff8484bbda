#!/bin/sh
# Makes the environment in which NVIDIA ModelOpt quantizes for TensorRT: .cache/modelopt, or $QPERT_MODELOPT_ENV. See
# environment.sh.
#
# ModelOpt 0.47 pins onnx 1.21 and onnxruntime-gpu 1.24 and installs CuPy, none of which agrees with what qpert uses, so
# it has an environment of its own; `qpert quantize --target tensorrt` calls it as a process. It needs no GPU.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
title=ModelOpt env=${QPERT_MODELOPT_ENV:-$root/.cache/modelopt}
. "$root/tools/environment.sh"

pins='torch==2.13.0 nvidia-modelopt[onnx]==0.47.0'

needs_python 3.11
begin modelopt QPERT_MODELOPT_ENV 'some minutes, 3 GB' "$pins"
# shellcheck disable=SC2086 # the pins are meant to split into words
install $pins
"$env/bin/python" -I -W ignore -c 'import modelopt.onnx.quantization' >&2
finish
