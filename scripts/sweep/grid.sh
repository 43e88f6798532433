#!/usr/bin/env bash
# Trains a config once for each learning rate and seed, one after another, and lays the runs side by side in a page:
#   scripts/sweep/grid.sh runs/sweep -c configs/tiny/audio.yaml
# A run that is complete is not done again, and one that was stopped goes on: start the same line anew at any time.
set -euo pipefail
out=$1
shift
for rate in 0.0005 0.002; do
  for seed in 0 1; do
    run="$out/rate=$rate,seed=$seed"
    [ -e "$run/done" ] && continue
    mmdiff fit "$@" --resume --trainer.default_root_dir "$run" \
      --seed_everything "$seed" --model.init_args.seed "$seed" --model.init_args.optimizer.init_args.lr "$rate"
    touch "$run/done"
  done
done
mmdiff compare "$out"/*/lightning_logs/version_0 --out "$out/compare.html"
