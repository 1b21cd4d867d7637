#!/usr/bin/env bash
# The four things that vfmtok-fast does, with the small emoji model that comes with it, on emoji
# that it was not trained on. `make demo` runs this script. To run it by hand: examples/demo.sh
# [OUT], with vfmtok-fast on PATH.
set -euo pipefail

images=$(dirname "$0")/emoji/data/heldout
out=${1:-demo_out}
# Eight of the nine groups: animals, flags, food, objects, people, smileys, symbols, places.
columns=(--num 64 --size 64 --classes 1 2 3 4 5 6 7 8)

step() {
    printf '\n== %s\n' "$1"
    shift
    printf '$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

# Remove only what this script makes, so that every run starts from nothing.
rm -rf "$out/cache" "$out/samples" "$out/guided" "$out/reconstruction.png"
mkdir -p "$out"

step "Pictures to tokens, kept as a cache" \
    vfmtok-fast cache "$images" "$out/cache" --model emoji
step "Is the cache whole and sound?" vfmtok-fast verify "$out/cache"
step "Tokens back to pictures" \
    vfmtok-fast reconstruct "$images" "$out/reconstruction.png" --model emoji --limit 8
step "New pictures, a column a group" \
    vfmtok-fast sample "$out/samples" --model emoji --gpt emoji "${columns[@]}"
step "The same with guidance" \
    vfmtok-fast sample "$out/guided" --model emoji --gpt emoji "${columns[@]}" --cfg-scale 2

cat <<TEXT

Done. Look at:
  $out/cache/               the token cache: manifest.json, index.parquet, shards/
  $out/reconstruction.png   picture | reconstruction | where the regions look
  $out/samples/, $out/guided/   samples as a PNG grid and as an .npz
The model is a small one, trained in under four hours on two processor cores: examples/emoji/README.md.
TEXT
