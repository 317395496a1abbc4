#!/bin/bash
#SBATCH --nodes=1 --ntasks=1 --gpus-per-node=4 --cpus-per-task=32 --signal=B:TERM@120
# A run on one node of a Slurm cluster with four GPUs. It saves and stops after 710 minutes; the same command resumes it.
# Needs: a cluster with Slurm and a partition of at least 12 hours. Not run by us.
# Usage: sbatch docs/runs/slurm-one-node.sh RECIPE
set -eu
recipe=${1:?usage: sbatch docs/runs/slurm-one-node.sh RECIPE}
srun distill run "$recipe" --gpus 4 --stop-after 710
