#!/usr/bin/env bash
# Step 6 on several GPUs: step6_train_sft.py under torchrun with DeepSpeed ZeRO-2.
#
#   bash step6_train_sft_multi_gpu.sh [flags of step6_train_sft.py]
#
# chatglm_ja/training/torchrun.sh documents the environment variables (NPROC_PER_NODE, NNODES, ...).
set -euo pipefail
launcher="$(dirname "${BASH_SOURCE[0]}")/chatglm_ja/training/torchrun.sh"
exec bash "$launcher" step6_train_sft.py "$@"
