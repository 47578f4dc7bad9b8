#!/usr/bin/env bash
# Many nodes: run this on each of them, with the same HEAD, which is one of the nodes.
#
#     HEAD=node-0:29500 NODES=4 training/launch/torchrun.sh training/pretrain.py CONFIG --resume
#
# GPUS=8            processes on each node (on nodes without GPUs: CPU processes)
# SHARDING=fsdp2    `ddp` averages gradients, `fsdp2` shares weights, gradients and optimizer states out (OFFLOAD=true: in host memory)
# RESTARTS=0        how often all processes are started again after one has failed; they go on from the newest checkpoint
#
# `output` and the data must be on storage that all nodes see: the first process writes, all read when a run is resumed.
set -euo pipefail

: "${HEAD:?set HEAD=host:port, the same on every node}"
: "${NODES:?set NODES to the number of nodes}"
[ $# -gt 0 ] || { echo "usage: HEAD=host:port NODES=n $0 SCRIPT CONFIG [a.b=c ...]" >&2; exit 2; }

case "${SHARDING:-fsdp2}" in
  fsdp2)
    export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_OFFLOAD_PARAMS="${OFFLOAD:-false}" ;;
  ddp) ;;
  *) echo "SHARDING=$SHARDING; expected fsdp2 or ddp" >&2; exit 2 ;;
esac

exec torchrun --nnodes "$NODES" --nproc_per_node "${GPUS:-8}" --max_restarts "${RESTARTS:-0}" \
  --rdzv_backend c10d --rdzv_endpoint "$HEAD" --rdzv_id "${RUN_ID:-mmllm}" "$@"
