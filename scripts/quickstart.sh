#!/usr/bin/env bash
# From nothing to a trained model: a corpus, shards, about three minutes of training, an evaluation on held-out
# text next to gzip, a sample, a loss curve.
#
#   scripts/quickstart.sh           the King James Bible, from the distribution's packages
#   scripts/quickstart.sh FILE.txt  any text of a megabyte or more
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
text=${1:-}
if [ -n "$text" ]; then
    [ -r "$text" ] || { echo "quickstart: cannot read $text" >&2; exit 2; }
    name=$(basename "${text%.*}" | tr -c 'A-Za-z0-9\n' '_')
    run=runs/quickstart_$name
    separator=()
else
    name=bible
    text=data/corpus/bible.txt
    run=runs/quickstart
    separator=(--document-separator blank-lines)
    [ -r "$text" ] || $python data/corpus.py bible
fi
data=data/$name

echo "== 1. Shards of bytes from $text"
if ! ls "$data"/train_*.bin >/dev/null 2>&1; then
    $python data/prepare.py --tokenizer bytes "${separator[@]}" --out "$data" "$text"
else
    echo "$data/ is there already; remove it to prepare it again"
fi

echo
echo "== 2. Training (configs/quickstart.ini; the same command continues an interrupted run)"
./train_iha train configs/quickstart.ini data.train="$data/train_*.bin" data.val="$data/val_*.bin" run.dir="$run"

echo
echo "== 3. Held-out text"
result=$(./train_iha eval "$run" data.val="$data/val_*.bin" | tail -1)
$python scripts/compare_gzip.py "$result" "$data"/val_*.bin

echo
echo "== 4. A sample"
./train_iha generate "$run" --tokens 600 --temperature 0.6

echo
echo "== 5. The loss curve"
$python scripts/plot_loss.py "$run" --bytes --out "$run/curve.png"
cat <<END

Everything is in $run/: curve.png, metrics.jsonl, samples.txt, and the checkpoint (model.safetensors, config.json).
Next:
  ./train_iha generate $run --prompt 'And the LORD said' --temperature 0.6
  ./train_iha info $run
  ./train_iha train configs/quickstart.ini run.dir=runs/mha model.layer_pattern=mha_global   # the same without IHA
  $python scripts/plot_loss.py $run runs/mha --out runs/both.png                             # and the two curves
END
