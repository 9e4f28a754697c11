#!/usr/bin/env bash
# Pretrains a GPT of a preset's size on one machine, or on all machines of a hostfile. Written for GPUs; not run on any.
#
#   launch/pretrain_gpt_megatron.sh 1.3b DATA_PREFIX RUN_FOLDER
#   HOSTFILE=hosts launch/pretrain_gpt_megatron.sh 13b DATA_PREFIX RUN_FOLDER --save-interval 1000
#
# The JSONs' batches are for 64 GPUs: with another number scale gradient_accumulation_steps. RUN_FOLDER has to be one
# that all machines share.
#
# Every rank gets cores of its own, from which it takes its root threads: --bind_cores_to_rank needs numactl.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 3 ]; then
    echo "usage: [HOSTFILE=file] $0 1.3b|6.7b|13b|70b DATA_PREFIX RUN_FOLDER [flags of pretrain_gpt_megatron.py]" >&2
    exit 2
fi
preset=$1 data=$2 run=$3
shift 3
flags=$(python launch/megatron_presets.py "$preset")
machines=()
if [ -n "${HOSTFILE:-}" ]; then
    machines=(--hostfile "$HOSTFILE")
fi
# shellcheck disable=SC2086 # the preset's flags are words
exec deepspeed "${machines[@]}" --bind_cores_to_rank launch/pretrain_gpt_megatron.py --deepspeed $flags \
    --data-path "$data" --save "$run" "$@"
