#!/usr/bin/env bash
# Train the emoji model from scratch: foundation model, tokenizer, codes, generator, metrics,
# images. Run it as examples/emoji/run.sh OUT, with vfmtok-fast, python and torchrun on PATH. If it
# is stopped anywhere, the same command resumes.
#
# STEPS (12000), SHARP_STEPS (4000) and GPT_STEPS (3000) set how long the tokenizer trains, without
# and with a discriminator, and the generator. PROCESSES (2) sets the number of training processes,
# each with one thread: on a shared machine, threads that wait for each other lose most of their
# time, while processes synchronise only once per step.
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

# No LPIPS: there is no source for its weights here.
"${together[@]}" train-tokenizer "$pictures" "$out/soft" --start-from "$out/start" \
    --steps "${STEPS:-12000}" --batch-size 8 --lr 1e-3 --warmup-steps 100 \
    --schedule cosine --min-lr 1e-5 --ema 0.995 --pixel-loss l1 --no-lpips \
    --discriminator none --revive-after 500 --workers 1 \
    --save-every 250 --log-every 25 --show-every 250

# A PatchGAN, which needs no weights, sharpens the edges. Its batch norms need all eight images of a
# step, so this is one process.
vfmtok-fast train-tokenizer "$pictures" "$out/tokenizer" --start-from "$out/soft/model" \
    --recipe rae --discriminator patch --discriminator-start 300 --discriminator-weight 0.3 \
    --steps "${SHARP_STEPS:-4000}" --batch-size 8 --lr 2e-4 --warmup-steps 100 \
    --min-lr 1e-5 --ema 0.995 --pixel-loss l1 --no-lpips --revive-after 500 --workers 1 \
    --save-every 250 --log-every 25 --show-every 250

tokenizer=$out/tokenizer/model
vfmtok-fast cache "$pictures" "$out/cache" --model "$tokenizer" --views center center-flip
vfmtok-fast verify "$out/cache"
# Dropout is 0.2: with 0.1 the generator had memorised the training images after 15 epochs.
"${together[@]}" train-gpt "$out/cache" "$out/generator" --config "$here/generator.json" \
    --dropout 0.2 --steps "${GPT_STEPS:-3000}" --batch-size 32 --lr 1e-3 --warmup-steps 100 \
    --schedule cosine --ema 0.995 --save-every 250 --log-every 50 --show-every 0

generator=$out/generator/model
python "$here/evaluate.py" "$here/data" "$here/classifier.safetensors" \
    --tokenizer "$tokenizer" --gpt "$generator" --cache "$out/cache" | tee "$out/figures.json"
vfmtok-fast sample "$out/samples" --model "$tokenizer" --gpt "$generator" \
    --num 64 --size 64 --classes 1 2 3 4 5 6 7 8 --cfg-scale 2
