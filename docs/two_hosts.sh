#!/usr/bin/env bash
# A dry run of two machines on one: bash docs/two_hosts.sh [flags of step5_train_pt.py]
#
# Starts the launcher of step 5 twice with the variables that two machines would have, one process
# each on the CPU; they meet over the loopback network, and what they say is marked with the machine.
# It trains the demo's model, whose steps 1 to 4 must have run.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

export CHATGLM_JA_PROFILE=demo CUDA_VISIBLE_DEVICES="" GLOO_SOCKET_IFNAME=lo
export NNODES=2 NPROC_PER_NODE="${NPROC_PER_NODE:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export MASTER_ADDR=127.0.0.1 MASTER_PORT="${MASTER_PORT:-29500}"

machine() { # machine RANK: becomes its launcher
  # The marks outlive a Ctrl-C, so that what is said after it is seen.
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
# Where one fails, the other has nothing to wait for.
wait -n "${machines[@]}" || { status=$?; stop; }
for pid in "${machines[@]}"; do
  wait "$pid" || { code=$?; ((status)) || status=$code; }
done
exit "$status"
