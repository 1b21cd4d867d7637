#!/usr/bin/env bash
# The emoji model from nothing: foundation model, tokenizer, codes, generator, figures, pictures.
# By hand: examples/emoji/run.sh OUT, with vfmtok-fast, python and torchrun on PATH. Stopped
# anywhere, the same command goes on.
#
# STEPS (12000) and GPT_STEPS (3000) are how long the two train, PROCESSES (2) how many train at
# once, each on one thread: threads that wait for each other lose most of their time on a machine
# that others use too, and processes meet only once a step.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:?"examples/emoji/run.sh OUT"}
pictures=$here/data/train.parquet
export OMP_NUM_THREADS=1
together=(torchrun --nproc-per-node "${PROCESSES:-2}" -m vfmtok_fast)
mkdir -p "$out"

if [ ! -f "$out/foundation.pth" ]; then
    OMP_NUM_THREADS=${PROCESSES:-2} OMP_WAIT_POLICY=passive \
        python "$here/foundation.py" "$pictures" "$out/foundation.pth" --steps 1200 --batch-size 32
fi
[ -d "$out/start" ] || python "$here/start.py" "$out/foundation.pth" "$pictures" "$out/start"

# No LPIPS and no discriminator: there is nothing here that their weights could come from.
"${together[@]}" train-tokenizer "$pictures" "$out/tokenizer" --start-from "$out/start" \
    --steps "${STEPS:-12000}" --batch-size 8 --lr 1e-3 --warmup-steps 100 \
    --schedule cosine --min-lr 1e-5 --ema 0.995 --pixel-loss l1 --no-lpips \
    --discriminator none --revive-after 500 --workers 1 \
    --save-every 250 --log-every 25 --show-every 250

tokenizer=$out/tokenizer/model
vfmtok-fast cache "$pictures" "$out/cache" --model "$tokenizer" --views center center-flip
vfmtok-fast verify "$out/cache"
# A fifth is dropped: with a tenth it knew the training pictures by heart after 15 epochs.
"${together[@]}" train-gpt "$out/cache" "$out/generator" --config "$here/generator.json" \
    --dropout 0.2 --steps "${GPT_STEPS:-3000}" --batch-size 32 --lr 1e-3 --warmup-steps 100 \
    --schedule cosine --ema 0.995 --save-every 250 --log-every 50 --show-every 0

generator=$out/generator/model
python "$here/evaluate.py" "$here/data" "$here/classifier.safetensors" \
    --tokenizer "$tokenizer" --gpt "$generator" --cache "$out/cache" | tee "$out/figures.json"
vfmtok-fast sample "$out/samples" --model "$tokenizer" --gpt "$generator" \
    --num 64 --size 64 --classes 1 2 3 4 5 6 7 8 --cfg-scale 2
