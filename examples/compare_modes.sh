#!/bin/sh
# Unified, chunked and disaggregated on this machine's cores with the bundled model, with a chart; four minutes.
# Run: sh examples/compare_modes.sh [further flags of diptych compare]
# DIPTYCH is the command (default: .venv/bin/diptych of this checkout). What comes of it is in results/, here.
diptych=${DIPTYCH:-$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/diptych}
mkdir -p results
exec "$diptych" compare --rate 14 --chunk 128 --out results/modes.json --chart results/modes.png "$@"
