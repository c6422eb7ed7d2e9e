#!/bin/bash
# A script of train_scripts/ on a SLURM cluster: 2 nodes of 8 GPUs, whole networks on each GPU (CONFIG=2node_fsdp2.yaml cuts them instead).
#
#   sbatch train_scripts/cluster/slurm.sh dmd --teacher stabilityai/stable-diffusion-xl-base-1.0 --data prompts.txt --lora 64 --output_dir runs/sdxl
#   DRY_RUN=1 bash train_scripts/cluster/slurm.sh dmd ...          # prints the command of each node and stops
#
# Submit it from the checkout, in the environment the package is installed in. A job that is stopped by its time limit gets SIGTERM two
# minutes before, saves, and is put back in the queue: the same command resumes.
#SBATCH --job-name=fewstep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
set -euo pipefail

METHOD=$1
shift
NODES=${SLURM_NNODES:-2}
GPUS=${SLURM_GPUS_ON_NODE:-8}
CONFIG=${CONFIG:-2node_ddp.yaml}
HEAD=$( [ -n "${SLURM_JOB_NODELIST:-}" ] && scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1 || echo 127.0.0.1 )
PORT=$((20000 + ${SLURM_JOB_ID:-0} % 20000))

# SLURM_NODEID differs from node to node, so the node's own shell fills it in.
NODE="accelerate launch --config_file train_scripts/accelerate/$CONFIG --num_machines $NODES --num_processes $((NODES * GPUS)) --machine_rank \${SLURM_NODEID:-0} --main_process_ip $HEAD --main_process_port $PORT train_scripts/train_$METHOD.py $(printf '%q ' "$@")"

if [ -n "${DRY_RUN:-}" ]; then
    echo "$NODE"
    exit
fi
requeue() {
    kill -TERM "$STEP" 2> /dev/null || true
    wait "$STEP" || true
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue TERM
srun --kill-on-bad-exit=1 bash -c "exec $NODE" &
STEP=$!
wait "$STEP"
