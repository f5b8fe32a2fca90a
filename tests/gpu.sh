#!/usr/bin/env bash
# The figures of the README's hardware table, on a machine with one GPU. From the root:
#   bash tests/gpu.sh                      all of it: checks, training, benches; some 20 minutes
#   bash tests/gpu.sh checks training      some of it
# Weights are random, of SD1.5's and the step-aware judge's published sizes: 5 GB in out/gpu.
# Nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
out=out/gpu

run() { printf '\n$ %s\n' "$*"; "$@"; }

checks() {
    run python -m pytest -q tests -k "cuda or gpu"
    run python tests/bench.py --device cuda # the gradients of both ways agree
}

training() {
    [ -d $out/weights ] || run python tests/bench.py --save $out --device cuda
    for precision in bf16 fp16; do
        rm -rf $out/$precision
        run python train.py --div js --model $out/sd15 --weights $out/weights --judge step_aware \
            --prompts toy/prompts.txt --threshold 0 --mixed_precision $precision \
            --max_train_steps 20 --num_eval_prompts 4 --images_per_prompt 1 \
            --device cuda --output_dir $out/$precision
        run python tests/bench.py --summary $out/$precision
    done
}

benches() {
    run python tests/bench.py --loop --model sd15 --device cuda --prompts 10 --repeats 3 --compile
    run python tests/bench.py --memory # to be compared with the peaks above
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
for part in ${*:-checks training benches}; do "$part"; done
