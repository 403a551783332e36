#!/usr/bin/env bash
# Start a training step under torchrun with DeepSpeed ZeRO-2: torchrun.sh SCRIPT [FLAGS].
# The step*_multi_gpu.sh files call this; they document the environment variables.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

if ! command -v torchrun >/dev/null && [[ -x "$root/.venv/bin/torchrun" ]]; then
  PATH="$root/.venv/bin:$PATH"
fi
if ! command -v torchrun >/dev/null; then
  echo "error: torchrun not found: run \`source .venv/bin/activate\` first" >&2
  exit 1
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
[[ " $* " == *" --help "* || " $* " == *" -h "* ]] && exec python "$1" --help
if [[ -z "${NPROC_PER_NODE:-}" ]]; then
  NPROC_PER_NODE="$(python -c 'import torch; print(torch.cuda.device_count())')"
  if [[ "$NPROC_PER_NODE" -eq 0 ]]; then
    echo "error: no GPU found: set NPROC_PER_NODE=2, or more, to run on the CPU over gloo" >&2
    exit 1
  fi
fi
# torchrun would give every process one thread, and say so.
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  OMP_NUM_THREADS=$(($(nproc) / NPROC_PER_NODE))
  export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
fi
# GeForce cards from the 40 series on cannot read each other's memory, but some drivers say that they
# can: NCCL then hangs, and accelerate refuses unless both variables are set. InfiniBand is of no use
# on one machine; between several it stays on. What the user has set stays.
if command -v nvidia-smi >/dev/null &&
  nvidia-smi --query-gpu=name --format=csv,noheader | grep 'GeForce RTX [45]0' >/dev/null; then
  export NCCL_P2P_DISABLE="${NCCL_P2P_DISABLE:-1}"
  export NCCL_IB_DISABLE="${NCCL_IB_DISABLE:-$((${NNODES:-1} == 1))}"
  echo "GPUs without peer access: NCCL_P2P_DISABLE=$NCCL_P2P_DISABLE" \
    "NCCL_IB_DISABLE=$NCCL_IB_DISABLE" >&2
fi
# A process that is told to stop ends its step and writes a checkpoint, 9 GB at 6B size; torchrun
# would kill it after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-180}"
# What is wrong with settings or inputs is said once here, not by every process.
WORLD_SIZE=$((${NNODES:-1} * NPROC_PER_NODE)) \
  python "$1" --check --deepspeed "$root/ds_zero2.json" "${@:2}"
# An estimate was asked for, and has been given.
[[ " $* " == *" --estimate"* ]] && exit 0

exec python -m chatglm_ja.training.launch \
  --nproc_per_node "$NPROC_PER_NODE" \
  --nnodes "${NNODES:-1}" \
  --node_rank "${NODE_RANK:-0}" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" \
  --master_port "${MASTER_PORT:-29500}" \
  "$1" --deepspeed "$root/ds_zero2.json" "${@:2}"
