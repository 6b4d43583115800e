#!/bin/bash
# Train on several machines under SLURM: sbatch configs/slurm.sh [flags of scripts.train]
# If preempted or out of time, the job saves a checkpoint, requeues itself and resumes when scheduled again.

#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1           # one torchrun per node, which starts one rank per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120             # two minutes before the time limit: finish the step, save, exit
#SBATCH --requeue                     # requeue after preemption, which also sends SIGTERM first
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

log_dir=${LOG_DIR:?set it to a folder for the run, on a file system shared by all nodes}
gpus=${SLURM_GPUS_ON_NODE:-1}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
newest() { find "$log_dir" -name 'model_[0-9]*.pt' 2>/dev/null | sort -V | tail -n 1; }

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110   # seconds torchrun 2.15 allows for a step and its save; older versions: 30

before=$(newest)
srun .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$gpus" --max-restarts=3 --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d --rdzv_endpoint="$first:29500" -m scripts.train "$@" --log_dir "$log_dir"
status=$?

# Status 0: finished. Otherwise requeue, but only if a new checkpoint was saved, so that no error repeats forever.
if (( status != 0 )) && [[ $(newest) != "$before" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
