#!/usr/bin/env bash
# Step 5 on several GPUs: the same step5_train_pt.py under torchrun, with DeepSpeed ZeRO-2.
#
#   bash step5_train_pt_multi_gpu.sh [flags of step5_train_pt.py]
#
# From the environment: NPROC_PER_NODE (default: the GPUs found), and for several machines NNODES,
# NODE_RANK, MASTER_ADDR, MASTER_PORT. Without a GPU, NPROC_PER_NODE processes run over gloo. On
# cards without peer access NCCL_P2P_DISABLE and NCCL_IB_DISABLE are set, unless they are already.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$root/chatglm_ja/training/torchrun.sh" "$root/step5_train_pt.py" "$@"
