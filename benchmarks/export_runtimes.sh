#!/usr/bin/env bash
# The box (and stories260K, where LLAMAJAX_SHARED names the data) exported and run on every runtime that runs here, each
# toolchain in an environment of its own, which is made first. Ends with exit code 1 unless all give the same tokens.
#
#     benchmarks/export_runtimes.sh [FOLDER]       # with the Python that has llamajax on PATH as `python`
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$(mktemp -d)}
export PYTHONPATH=$PWD JAX_PLATFORMS=cpu

environment() { # name, packages
  [ -x "$work/$1/bin/python" ] || python -m venv "$work/$1"
  "$work/$1/bin/pip" install --quiet --disable-pip-version-check "${@:2}"
}
environment iree iree-base-compiler iree-base-runtime numpy
environment onnx 'jax>=0.10' onnx onnxruntime openvino numpy
environment tensorflow tensorflow-cpu numpy
environment litert ai-edge-litert numpy

llamajax() { python -m llamajax "$@"; }
pythons=iree=$work/iree/bin/python,onnx=$work/onnx/bin/python,openvino=$work/onnx/bin/python
pythons=$pythons,savedmodel=$work/tensorflow/bin/python,litert=$work/litert/bin/python
builders=iree=$work/iree/bin/python,onnx=$work/onnx/bin/python
builders=$builders,savedmodel=$work/tensorflow/bin/python,litert=$work/tensorflow/bin/python

models=(box)
[ -z "${LLAMAJAX_SHARED:-}" ] || models+=(stories260K)
for model in "${models[@]}"; do
  source=(--model=box)
  [ "$model" = box ] || source=(--model="$LLAMAJAX_SHARED/data/stories260K/stories260K.bin"
                                --tokenizer="$LLAMAJAX_SHARED/data/stories260K/tok512.model")
  packed=$work/$model-int4
  [ -d "$packed" ] || llamajax quantize "${source[@]}" --recipe=int4-g32 --output="$packed"
  for profile in unrolled float; do
    targets=iree-cpu,onnx
    [ $profile = unrolled ] || targets=savedmodel,litert
    rm -rf "$work/$model-$profile"
    llamajax export --model="$packed" --output="$work/$model-$profile" --profile=$profile --target=$targets \
      --python="$builders" > /dev/null
    llamajax verify "$work/$model-$profile" --python="$pythons"
  done
done
