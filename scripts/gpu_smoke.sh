#!/usr/bin/env bash
# Checks all implementations on this host's accelerators and times them briefly; the records go to a folder.
#
#   scripts/gpu_smoke.sh [--cpu] [--out FOLDER] [KEY=VALUE ...]
#
# KEY=VALUE are configuration keys that win over those of configs/sweeps/gpu_smoke*.yaml, for example
# workload.model.layers=4 on a small device. --cpu goes through the same steps in a reduced form without
# accelerators. What is finished is not run again.
#
# Exit status: 0 all is well; 1 something failed or is not correct; 2 there is no accelerator, or bad usage.
set -uo pipefail
cd "$(dirname "$0")/.."

out=results/gpu_smoke cpu='' options=()
while [ $# -gt 0 ]; do
  case $1 in
    --cpu) cpu=1 ;;
    --out) [ $# -ge 2 ] || { echo 'gpu_smoke: --out needs a folder' >&2; exit 2; }
           out=$2; shift ;;
    *=*) options+=("$1") ;;
    *) echo "gpu_smoke: unknown argument '$1'; usage: scripts/gpu_smoke.sh [--cpu] [--out FOLDER] [KEY=VALUE ...]" >&2
       exit 2 ;;
  esac
  shift
done

python=${PYTHON:-.venv/bin/python}
export TOKENIZERS_PARALLELISM=false PYTORCH_NVML_BASED_CUDA_CHECK=1
if [ -n "$cpu" ]; then
  export CUDA_VISIBLE_DEVICES='' SUITE_TEST_ACCELERATOR=0
  ranks=2
  tiny=(workload.model.{layers=2,hidden=64,heads=2,intermediate=128,vocab=512,seq_len=32})
  options=("${tiny[@]}" train.micro_batch=1 train.steps=2 train.warmup=1 "${options[@]}")
else
  export SUITE_TEST_ACCELERATOR=1
  count=$("$python" -c 'import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)') \
    || { echo "gpu_smoke: cannot run $python with torch; run 'make setup', or say PYTHON=..." >&2; exit 2; }
  if [ "$count" -eq 0 ]; then
    echo 'gpu_smoke: no accelerator was found; scripts/gpu_smoke.sh --cpu runs a reduced form without one' >&2
    exit 2
  fi
  ranks=1
  while [ $((2 * ranks)) -le "$count" ]; do ranks=$((2 * ranks)); done
fi
echo "gpu_smoke: $ranks ranks, records in $out"

status=0
step() { echo "gpu_smoke: $*"; "$python" "$@" || { echo "gpu_smoke: failed: $*" >&2; status=1; }; }

step -m suite.cli doctor
if "$python" -c 'import pytest' 2> /dev/null; then
  step -m pytest -q tests/test_devices.py tests/test_side_stream.py
fi
sweep() { step -m suite.cli sweep "configs/sweeps/$1.yaml" --out "$out" wandb.mode=disabled "${@:2}"; }
sweep gpu_smoke testbed.ranks=$ranks "${options[@]}"
[ "$ranks" -lt 2 ] || sweep gpu_smoke_ranks testbed.ranks=$ranks "${options[@]}"
if [ "$ranks" -ge 4 ] || [ -n "$cpu" ]; then
  [ "$ranks" -ge 4 ] || ranks=4
  sweep gpu_smoke_nodes testbed.nodes=2 testbed.ranks=$ranks impl.options.partition_size=$ranks "${options[@]}"
fi
[ $status -eq 0 ] && echo "gpu_smoke: all is well; see $out/records.jsonl"
exit $status
