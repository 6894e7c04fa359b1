#!/usr/bin/env bash
# From nothing to a trained model: a corpus, shards, about three minutes of training, an evaluation on held-out
# text next to gzip, a sample, a loss curve.
#
#   scripts/quickstart.sh           the King James Bible, from the distribution's packages
#   scripts/quickstart.sh FILE.txt  any text of a megabyte or more
set -euo pipefail
cd "$(dirname "$0")/.."

trap 'exit 130' INT TERM # a stopped training run saves and exits 0; the rest should not follow
python=.venv/bin/python
text=${1:-}
if [ -n "$text" ]; then
    [ -f "$text" ] && [ -r "$text" ] || { echo "quickstart: cannot read $text" >&2; exit 2; }
    bytes=$(wc -c <"$text")
    if [ "$bytes" -lt 200000 ]; then
        echo "quickstart: $text has $bytes bytes; a model wants a megabyte or more to learn from" >&2
        exit 2
    fi
    if [ "$(tr -d '\0' <"$text" | wc -c)" != "$bytes" ]; then
        echo "quickstart: $text holds NUL bytes: it is not a text" >&2
        exit 2
    fi
    name=text_$(cksum <"$text" | cut -d' ' -f1) # by content: an edited file is another corpus
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
    $python data/prepare.py --tokenizer bytes "${separator[@]}" --out "$data" -- "$text"
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

Everything is in $run/: curve.png, metrics.jsonl, and the checkpoint (model.safetensors, config.json).
Next:
  ./train_iha generate $run --prompt 'And the' --temperature 0.6
  ./train_iha info $run
  # the same without IHA, and the two curves:
  ./train_iha train configs/quickstart.ini data.train="$data/train_*.bin" data.val="$data/val_*.bin" \\
      run.dir=${run}_mha model.layer_pattern=mha_global
  $python scripts/plot_loss.py $run ${run}_mha --out runs/both.png
END
