#!/usr/bin/env bash
# One run on several nodes of a SLURM cluster. It continues in a new job until it has finished:
#
#   sbatch --nodes=2 launch/slurm.sh recipe=multipl_e output_dir=/shared/outputs/multipl_e
#
# Two minutes before the time limit SLURM sends SIGTERM: the run finishes its step, for which torchrun allows 30 s, and saves.
# Then, or after a crash, the job returns to the queue if the run made progress; SLURM itself requeues it after a node
# failed (--requeue). A run that ends without progress, for instance because of an error in its recipe, ends the job.
#SBATCH --job-name=flora_train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

source .venv/bin/activate
run=$(printf '%s\n' "$@" | sed -n 's/^output_dir=//p')
# complete checkpoints, and journals of evaluations
reached() { find "$run/checkpoints" "$run/eval" -type f ! -name '.*' -printf '%P %s\n' 2>/dev/null | sort; }
before=$(reached)
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# sbatch runs this script on one node, and srun starts one launcher per node; each reads its rank from SLURM_NODEID
export FIRST=$first EACH=${SLURM_GPUS_ON_NODE:-8} PORT=$((29500 + SLURM_JOB_ID % 1000))
# shellcheck disable=SC2016 (expanded on each node)
srun --kill-on-bad-exit=0 --wait=60 bash -c 'exec accelerate launch --quiet --config_file launch/multi_node.yaml \
  --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --main_process_ip "$FIRST" --main_process_port "$PORT" \
  --num_processes $((SLURM_NNODES * EACH)) train.py "$@" resume=true' launch "$@"
status=$?
if [ "$status" != 0 ] && [ "$(reached)" != "$before" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
