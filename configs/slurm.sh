#!/bin/bash
# Train on several machines under SLURM: sbatch configs/slurm.sh [flags of scripts.train]
# Preempted, or out of time, the job saves, goes back into the queue and later goes on from there by itself.

#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1           # one torchrun a machine, which starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120             # two minutes before the end of the time: finish the step, save, leave
#SBATCH --requeue                     # preempted, which also begins with SIGTERM: back into the queue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

log_dir=${LOG_DIR:-log}               # on a disk that all machines see; it counts, not --log_dir
gpus=${SLURM_GPUS_ON_NODE:-1}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
newest() { find "$log_dir" -name 'model_[0-9]*.pt' 2>/dev/null | sort -V | tail -n 1; }

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110   # seconds that torchrun 2.15 leaves to a step and its save; older ones: 30

before=$(newest)
srun .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$gpus" --max-restarts=3 --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d --rdzv_endpoint="$first:29500" -m scripts.train "$@" --log_dir "$log_dir"
status=$?

# 0: the run is finished. Anything else: once more, as long as it gets ahead, so that a mistake is not repeated for ever.
if (( status != 0 )) && [[ $(newest) != "$before" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
