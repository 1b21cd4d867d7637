#!/usr/bin/env bash
# The four things that vfmtok-fast does, on the photos beside this file. `make demo` runs it; by
# hand: examples/demo.sh [OUT], with vfmtok-fast on PATH.
set -euo pipefail

images=$(dirname "$0")/images
out=${1:-demo_out}
model=(--untrained small)

step() {
    printf '\n== %s\n' "$1"
    shift
    printf '$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

cat <<'TEXT'
This demo runs a small model with UNTRAINED, seeded weights: it shows that the pipeline works and
what its files look like. The tokens mean nothing, and the pictures it draws are noise.
TEXT

# Only what this script makes, so that it starts from nothing each time.
rm -rf "$out/cache" "$out/samples" "$out/reconstruction.png"
mkdir -p "$out"

step "Photos to tokens, kept as a cache" vfmtok-fast cache "$images" "$out/cache" "${model[@]}"
step "Is the cache whole and sound?" vfmtok-fast verify "$out/cache"
step "Tokens back to pictures" \
    vfmtok-fast reconstruct "$images" "$out/reconstruction.png" "${model[@]}"
step "New pictures from class labels" vfmtok-fast sample "$out/samples" "${model[@]}"

cat <<TEXT

Done. The weights were untrained, so the pictures are noise. Look at:
  $out/cache/               the token cache: manifest.json, index.parquet, shards/
  $out/reconstruction.png   photo | reconstruction | where the regions look
  $out/samples/             samples as a PNG grid and as an .npz
TEXT
