#!/usr/bin/env bash
# One run by all GPUs of this machine: configs/torchrun.sh cfg.toml [--set KEY=VALUE ...]
# PROCESSES=4 configs/torchrun.sh ... for another number; without a GPU two processes, of half the cores each.
# COMMAND="sweep" configs/torchrun.sh cfg.toml --checkpoints 'out/checkpoint-*': a checkpoint a process.
set -euo pipefail

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + processes - 1) / processes))}

exec torchrun --standalone --nproc-per-node "$processes" -m funcprobe "${COMMAND:-run}" "$@"
