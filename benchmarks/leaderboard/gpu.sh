#!/usr/bin/env bash
# The boards that want a GPU, one after another and unattended: the larger budget on the shipped teachers, avatars, and CIFAR-10 where its files are.
#
#     bash benchmarks/leaderboard/gpu.sh                                     # the same line goes on where it stopped
#     CIFAR10=folder/plain_text BOARDS=cifar10 bash benchmarks/leaderboard/gpu.sh
#
# Each board is a folder beside this file; teachers, more avatars and the runs themselves go to $OUT. What fails is said at the end, and does not
# stop the rest.
set -uo pipefail
cd "$(dirname "$0")/../.."
BOARDS=${BOARDS:-fashion emoji avatars cifar10}
CALLS=${CALLS:-6000000}             # network calls a student: a hundred times the small budget
SEEDS=${SEEDS:-0 1 2}
METHODS=${METHODS:-}                # all
SAMPLES=${SAMPLES:-}                # run.py's own
BATCH=${BATCH:-256}
MINUTES=${MINUTES:-60}              # of training a teacher; its autoencoder takes as long
AVATARS=${AVATARS:-50000}           # drawn with Node.js and npm; without them the shipped 2,000 are all
CIFAR10=${CIFAR10:-data/cifar10}    # folder of the parquet files train-* and test-*
OUT=${OUT:-runs/gpu}
MORE=${MORE:-}                      # more flags of run.py
failed=()

board() {   # NAME FLAGS: no script's own --steps ends a training before its budget; a hundred looks at each, and not thousands
    python benchmarks/leaderboard/run.py "${@:2}" --seeds $SEEDS --max_calls "$CALLS" ${METHODS:+--methods $METHODS} ${SAMPLES:+--samples $SAMPLES} \
        --measure_every 500 --flags="--batch $BATCH --steps 100000000 --checkpoint_every 1000" $MORE || failed+=("$1")
}

made() {    # PLACE COMMAND: what is whole stays as it is, since rows are about these weights and pictures
    [ -e "$1" ] || { "${@:2}" --out "$1.part" && mv "$1.part" "$1"; }
}

avatars() {
    local at=$OUT/avatars file=zoo/assets/avatars/avatars.parquet
    mkdir -p "$at"
    if command -v npm >/dev/null; then
        file=$at/avatars.parquet
        made "$file" python train_scripts/make_avatars.py --count "$AVATARS" --seed 1 --work "$at/npm" || return
    fi
    made "$at/vae" python train_scripts/make_autoencoder.py --data "$file" --log "$at/vae.jsonl" --batch 64 --minutes "$MINUTES" --decoder-minutes "$MINUTES" || return
    made "$at/teacher" python train_scripts/make_teacher.py --data "$file" --vae "$at/vae" --checkpoint "$at/teacher.safetensors" --log "$at/teacher.jsonl" \
        --batch "$BATCH" --minutes "$MINUTES" || return
    board avatars --world avatars --teacher "$at/teacher" --data "$file"
}

cifar10() {
    local at=$OUT/cifar10 train test
    train=$(echo "$CIFAR10"/train-*.parquet) test=$(echo "$CIFAR10"/test-*.parquet)
    if ! [ -e "$train" ] || ! [ -e "$test" ]; then
        echo "no CIFAR-10 in $CIFAR10: put the parquet files of https://huggingface.co/datasets/uoft-cs/cifar10 (folder plain_text) there, or name their folder in CIFAR10"
        return 1
    fi
    made "$at/teacher" python train_scripts/make_fashion.py --images "$train?image=img" --width 128 --batch "$BATCH" --run "$at/run" --log "$at/teacher.jsonl" \
        --minutes "$MINUTES" || return
    board cifar10 --world cifar10 --teacher "$at/teacher" --data "$train?image=img" --test "$test?image=img"
}

for name in $BOARDS; do
    case $name in
        fashion|emoji) board "$name" --teacher "$name" ;;
        avatars|cifar10) $name || failed+=("$name") ;;
        *) echo "BOARDS=$name: there are fashion, emoji, avatars and cifar10"; exit 2 ;;
    esac
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
