#!/usr/bin/env bash
# The emoji model from nothing: foundation model, tokenizer, codes, generator, pictures. By hand:
# examples/emoji/run.sh OUT, with vfmtok-fast on PATH. Stopped anywhere, the same command goes on.
#
# PROCESSES (2) train at once, each on one thread; STEPS (3000) and GPT_STEPS (8000) are how long.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:?examples/emoji/run.sh OUT}
processes=${PROCESSES:-2}
# Threads of one process that wait for each other lose most of their time on a machine that others
# use too; processes meet once a step.
export OMP_NUM_THREADS=1
mkdir -p "$out"

if [ ! -f "$out/foundation.pth" ]; then
    OMP_WAIT_POLICY=passive OMP_NUM_THREADS=$processes \
        python "$here/foundation.py" "$here/data/train.parquet" "$out/foundation.pth" \
        --steps 1200 --batch-size 32
fi

# No LPIPS and no discriminator: there is nothing here that their weights could come from.
torchrun --nproc-per-node "$processes" -m vfmtok_fast train-tokenizer \
    "$here/data/train.parquet" "$out/tokenizer" \
    --config "$here/tokenizer.json" --backbone "$out/foundation.pth" \
    --steps "${STEPS:-3000}" --batch-size 16 --lr 1e-3 --warmup-steps 100 \
    --schedule cosine --min-lr 1e-5 --ema 0.995 --pixel-loss l1 --no-lpips \
    --discriminator none --revive-after 500 \
    --save-every 250 --log-every 25 --show-every 250
