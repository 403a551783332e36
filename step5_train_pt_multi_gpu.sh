#!/usr/bin/env bash
# Step 5 on several GPUs: step5_train_pt.py under torchrun with DeepSpeed ZeRO-2.
#
#   bash step5_train_pt_multi_gpu.sh [flags of step5_train_pt.py]
#
# chatglm_ja/training/torchrun.sh documents the environment variables (NPROC_PER_NODE, NNODES, ...).
set -euo pipefail
launcher="$(dirname "${BASH_SOURCE[0]}")/chatglm_ja/training/torchrun.sh"
exec bash "$launcher" step5_train_pt.py "$@"
