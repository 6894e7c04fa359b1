#!/usr/bin/env bash
# Prepare a text, train a model on it (four to five minutes; on twice the tokens where training is in bf16), evaluate it
# on held-out text next to gzip, print a sample, and write a page about the run.
#
#   scripts/quickstart.sh           the King James Bible, from the distribution's packages
#   scripts/quickstart.sh FILE.txt  any text of a megabyte or more
set -euo pipefail
cd "$(dirname "$0")/.."

trap 'exit 130' INT TERM # train_iha saves and exits 0 on these: do not go on after that
python=.venv/bin/python
text=${1:-}
if [ -n "$text" ]; then
    [ -f "$text" ] && [ -r "$text" ] || { echo "quickstart: cannot read $text" >&2; exit 2; }
    bytes=$(wc -c <"$text")
    if [ "$bytes" -lt 200000 ]; then
        echo "quickstart: $text has $bytes bytes: too few to train on; give a text of a megabyte or more" >&2
        exit 2
    fi
    if [ "$(tr -d '\0' <"$text" | wc -c)" != "$bytes" ]; then
        echo "quickstart: $text contains NUL bytes: not a text file" >&2
        exit 2
    fi
    name=text_$(cksum <"$text" | cut -d' ' -f1) # named by content, so that an edited file is prepared again
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
    echo "$data/ exists; remove it to prepare the data again"
fi

echo
# Muon's steps take longer than AdamW's, and reach more in the same time (docs/reproduction/optimizers/results.md).
steps=600
# Where training is in bf16, a step takes half as long.
case $(./train_iha info configs/quickstart.ini) in
*"Memory for training in bf16"*) steps=1200 ;;
esac
recipe=(train.optimizer=muon train.lr=0.012 train.steps=$steps)
echo "== 2. Training (configs/quickstart.ini; the same command continues an interrupted run)"
./train_iha train configs/quickstart.ini data.train="$data/train_*.bin" data.val="$data/val_*.bin" run.dir="$run" \
    "${recipe[@]}"

echo
echo "== 3. Held-out text"
result=$(./train_iha eval "$run" data.val="$data/val_*.bin" | tail -1)
$python scripts/compare_gzip.py "$result" "$data"/val_*.bin

echo
echo "== 4. A sample"
./train_iha generate "$run" --tokens 600 --temperature 0.6

echo
echo "== 5. The loss curve, and a page about the run"
$python scripts/plot_loss.py "$run" --bytes --out "$run/curve.png"
$python scripts/report.py "$run" --out "$run/report.html"
cat <<END

Open $run/report.html in a browser: curves, samples, time, memory.
Everything is in $run/: report.html, curve.png, metrics.jsonl, and the checkpoint (model.safetensors, config.json).
Next:
  ./train_iha generate $run --prompt 'And the' --temperature 0.6
  ./train_iha info $run
  # the same with plain attention, and both curves:
  ./train_iha train configs/quickstart.ini data.train="$data/train_*.bin" data.val="$data/val_*.bin" \\
      run.dir=${run}_mha ${recipe[*]} model.layer_pattern=mha_global
  $python scripts/report.py $run ${run}_mha --out runs/both.html
END
