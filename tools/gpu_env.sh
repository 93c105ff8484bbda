#!/bin/sh
# Makes the environment of `make gpu-acceptance`: .cache/gpu, or $QPERT_GPU_ENV. See environment.sh.
#
# It has an environment of its own because onnxruntime-gpu and onnxruntime overwrite each other. torch comes from the
# package index as a CUDA build. ONNX Runtime takes CUDA and cuDNN from NVIDIA's packages. TensorRT-RTX and classic
# TensorRT are tried one by one: without either, its lines are skipped and say so.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
title='GPU acceptance' env=${QPERT_GPU_ENV:-$root/.cache/gpu}
. "$root/tools/environment.sh"

if ! command -v nvidia-smi > /dev/null; then
    echo "an acceptance needs an NVIDIA GPU, and this machine has no nvidia-smi, which comes with the driver;" \
        "\`make gpu-acceptance-dry-run\` runs the same lines on the CPU with a small model, to test the script" >&2
    exit 3
fi

pins="torch==2.13.0 onnxruntime-gpu[cuda,cudnn] -e $root[gpu,export,test]"
engines="$root[rtx] $root[trt]"

needs_python 3.10
begin gpu QPERT_GPU_ENV 'several minutes, about 10 GB' "$pins" "$engines"
# shellcheck disable=SC2086 # the pins are meant to split into words
install -c "$root/constraints.txt" $pins
# shellcheck disable=SC2086
for pin in $engines; do
    install -c "$root/constraints.txt" -e "$pin" || echo "$pin cannot be installed here: its lines are skipped" >&2
done
"$env/bin/python" -c 'import torch; print("PyTorch", torch.__version__, "sees a GPU:", torch.cuda.is_available())' >&2
finish
