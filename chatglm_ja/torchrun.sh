#!/usr/bin/env bash
# Start a training step under torchrun with DeepSpeed ZeRO-2: torchrun.sh SCRIPT [FLAGS].
# The step*_multi_gpu.sh files call this; they document the environment variables.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if ! command -v torchrun >/dev/null && [[ -x "$root/.venv/bin/torchrun" ]]; then
  PATH="$root/.venv/bin:$PATH"
fi
if ! command -v torchrun >/dev/null; then
  echo "error: torchrun not found: run \`source .venv/bin/activate\` first" >&2
  exit 1
fi
if [[ -z "${NPROC_PER_NODE:-}" ]]; then
  NPROC_PER_NODE="$(python -c 'import torch; print(torch.cuda.device_count())')"
  if [[ "$NPROC_PER_NODE" -eq 0 ]]; then
    echo "error: no GPU found: set NPROC_PER_NODE to run on the CPU over gloo" >&2
    exit 1
  fi
fi
# torchrun would give every process one thread, and say so.
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  OMP_NUM_THREADS=$(($(nproc) / NPROC_PER_NODE))
  export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
fi
# What is wrong with settings or inputs is said once here, not by every process.
python "$1" --check --deepspeed "$root/ds_zero2.json" "${@:2}"

exec torchrun \
  --nproc_per_node "$NPROC_PER_NODE" \
  --nnodes "${NNODES:-1}" \
  --node_rank "${NODE_RANK:-0}" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" \
  --master_port "${MASTER_PORT:-29500}" \
  "$1" --deepspeed "$root/ds_zero2.json" "${@:2}"
