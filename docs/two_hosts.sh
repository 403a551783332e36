#!/usr/bin/env bash
# A dry run of two machines on one: bash docs/two_hosts.sh [flags of step5_train_pt.py]
#
# Starts the launcher of step 5 twice, as each of two machines would, with addresses of their own on
# the loopback network (127.0.0.1 and 127.0.0.2), one process each on the CPU, over gloo. What they
# say is marked with the machine. Steps 1 to 4 must have run.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

export NNODES=2 NPROC_PER_NODE="${NPROC_PER_NODE:-1}" MASTER_ADDR=127.0.0.1
export MASTER_PORT="${MASTER_PORT:-29500}" GLOO_SOCKET_IFNAME=lo CUDA_VISIBLE_DEVICES=""
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

host() { # host RANK: one machine; torchrun takes its own address from PET_LOCAL_ADDR
  NODE_RANK="$1" PET_LOCAL_ADDR="127.0.0.$(($1 + 1))" \
    bash "$root/step5_train_pt_multi_gpu.sh" "${@:2}" 2>&1 | sed -u "s/^/127.0.0.$(($1 + 1)): /"
}

host 1 "$@" &
host 0 "$@"
wait $!
