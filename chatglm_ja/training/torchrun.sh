#!/usr/bin/env bash
# Start a training step under torchrun with DeepSpeed ZeRO-2: torchrun.sh SCRIPT [FLAGS].
#
# Environment variables:
#   NPROC_PER_NODE           processes on this machine (default: its GPUs); needed without a GPU,
#                            where the processes communicate over gloo
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT      for several machines
#   NCCL_P2P_DISABLE, NCCL_IB_DISABLE                set below for GPUs without peer access
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
script="$root/$1"
shift

# The environment need not be activated.
if ! command -v torchrun >/dev/null && [[ -x "$root/.venv/bin/torchrun" ]]; then
  PATH="$root/.venv/bin:$PATH"
fi
if ! command -v python >/dev/null; then
  echo "error: python not found: run \`make -C $root .venv/ready\` first" >&2
  exit 1
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
[[ " $* " == *" --help "* || " $* " == *" -h "* ]] && exec python "$script" --help
check() { python "$script" --check --deepspeed "$root/ds_zero2.json" "$@"; }
if [[ " $* " == *" --estimate"* ]]; then
  check "$@"
  exit
fi
if [[ -z "${NPROC_PER_NODE:-}" ]]; then
  # Counting GPUs loads torch, and mistakes are to be said before.
  check "$@" --no-verify
  NPROC_PER_NODE="$(python -c 'import chatglm_ja, torch; print(torch.cuda.device_count())')"
  if [[ "$NPROC_PER_NODE" -eq 0 ]]; then
    echo "error: no GPU found: set NPROC_PER_NODE=2, or more, to run on the CPU over gloo" >&2
    exit 1
  fi
fi
# By default torchrun gives every process one thread.
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  OMP_NUM_THREADS=$(($(nproc) / NPROC_PER_NODE))
  export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
fi
# GeForce cards from the 40 series on have no peer access, but some drivers report it: NCCL then
# hangs, and accelerate refuses to start unless both variables are set. InfiniBand is needed between
# machines only. Values that the user has set are kept.
if command -v nvidia-smi >/dev/null &&
  nvidia-smi --query-gpu=name --format=csv,noheader | grep 'GeForce RTX [45]0' >/dev/null; then
  export NCCL_P2P_DISABLE="${NCCL_P2P_DISABLE:-1}"
  export NCCL_IB_DISABLE="${NCCL_IB_DISABLE:-$((${NNODES:-1} == 1))}"
  echo "GPUs without peer access: NCCL_P2P_DISABLE=$NCCL_P2P_DISABLE" \
    "NCCL_IB_DISABLE=$NCCL_IB_DISABLE" >&2
fi
# A process that receives SIGTERM ends its step and writes a checkpoint, 9 GB at 6B size. torchrun
# kills it after 30 seconds by default.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-180}"
# Check settings and inputs once, so that an error is not printed by every process.
WORLD_SIZE=$((${NNODES:-1} * NPROC_PER_NODE)) check "$@"

exec python -m chatglm_ja.training.launch \
  --nproc_per_node "$NPROC_PER_NODE" \
  --nnodes "${NNODES:-1}" \
  --node_rank "${NODE_RANK:-0}" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" \
  --master_port "${MASTER_PORT:-29500}" \
  "$script" --deepspeed "$root/ds_zero2.json" "$@"
