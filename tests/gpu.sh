#!/usr/bin/env bash
# The figures of the README's hardware table, on a machine with one GPU. From the root:
#   bash tests/gpu.sh                         all of it, in some 15 minutes
#   bash tests/gpu.sh checks training         some of it
#   DEVICE=cpu MODEL=toy bash tests/gpu.sh    the same commands, tried without one
# Weights are random, of SD1.5's and the step-aware judge's published sizes: 5 GB in out/gpu.
# Nothing is downloaded. What is printed is kept in out/gpu/figures.txt, part by part.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
device=${DEVICE:-cuda} size=${MODEL:-sd15} out=out/gpu
bench=(python tests/bench.py --device "$device")
model=(--model $out/sd15 --weights $out/weights --judge step_aware)
[ "$size" = sd15 ] || model=(--model "$size")
mkdir -p $out

run() { printf '\n$ %s\n' "$*"; "$@" || echo "FAILED: $*"; }

train() { # name, optimiser steps, flags
    rm -rf "$out/$1"
    run python train.py --div js "${model[@]}" --prompts toy/prompts.txt --threshold 0 \
        --num_eval_prompts 4 --images_per_prompt 1 --device "$device" \
        --output_dir "$out/$1" --max_train_steps "${@:2}"
    run "${bench[@]}" --summary "$out/$1"
}

checks() { # (a)
    run python -m pytest -q tests -k "cuda or gpu"
    run "${bench[@]}" # the gradients of both ways agree
}

benches() { # (b): goals: twice the reference's way, half of the floor, at most half its peak memory
    run "${bench[@]}" --model "$size" --repeats 5
    run "${bench[@]}" --model "$size" --loop --prompts 10 --repeats 3 --compile --preview $out/taesd
}

training() { # (c): no NaN
    train bf16 20 --mixed_precision bf16
    train fp16 20 --mixed_precision fp16
}

smallest() { # (d): goal: under 8 GB
    train smallest 2 --mixed_precision bf16 --gradient_checkpointing --train_batch_size 1 \
        --gradient_accumulation_steps 40
    run "${bench[@]}" --memory # counted, to be compared
}

[ -d $out/taesd ] || run "${bench[@]}" --model "$size" --save $out
for part in ${*:-checks benches training smallest}; do
    { nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
      "$part"; } 2>&1 | tee -a $out/figures.txt
done
! grep '^FAILED' $out/figures.txt
