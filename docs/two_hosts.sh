#!/usr/bin/env bash
# Simulate two machines on one: bash docs/two_hosts.sh [flags of step5_train_pt.py]
#
# Starts step 5's launcher twice, with the variables that two machines would have and one process each
# on the CPU. They connect over loopback, and each output line is prefixed with its machine. It trains
# the demo's model; steps 1 to 4 of the demo must have run.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

export CHATGLM_JA_PROFILE=demo CUDA_VISIBLE_DEVICES="" GLOO_SOCKET_IFNAME=lo
export NNODES=2 NPROC_PER_NODE="${NPROC_PER_NODE:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export MASTER_ADDR=127.0.0.1 MASTER_PORT="${MASTER_PORT:-29500}"

machine() { # machine RANK [flags]: exec the launcher of that machine
  # sed ignores Ctrl-C, so that output after it is still shown.
  exec > >(trap '' INT TERM; exec sed -u "s/^/machine $1: /") 2>&1
  NODE_RANK="$1" exec bash "$root/step5_train_pt_multi_gpu.sh" "${@:2}"
}

(machine 0 "$@") &
machines=($!)
(machine 1 "$@") &
machines+=($!)
stop() { kill "${machines[@]}" 2>/dev/null || true; }
trap stop INT TERM

status=0
# If one fails, the other has nothing to wait for.
wait -n "${machines[@]}" || { status=$?; stop; }
for pid in "${machines[@]}"; do
  wait "$pid" || { code=$?; ((status)) || status=$code; }
done
exit "$status"
