#!/usr/bin/env bash
# Each fuzz target for FUZZ_SECONDS (60), or those that are named. cargo-fuzz is put below target/ if it is not
# there; it wants what only nightly compilers let be asked for, and RUSTC_BOOTSTRAP has any compiler answer.
# What a run finds of new inputs stays in target/fuzz/corpus for the next one.
# usage: run.sh [TARGET…]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
seconds=${FUZZ_SECONDS:-60} dir=target/fuzz
export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$dir

say() { printf 'fuzz: %s\n' "$*" >&2; }
mapfile -t all < <(cd tests/fuzz/targets && printf '%s\n' *.rs | sed 's/\.rs$//')
targets=("$@")
[ $# != 0 ] || targets=("${all[@]}")
for target in "${targets[@]}"; do
    if ! [ -f "tests/fuzz/targets/$target.rs" ]; then
        say "there is no target $target; expected one of: ${all[*]}"
        exit 2
    fi
done

PATH=$PWD/target/tools/bin:$PATH
if ! cargo fuzz --version >/dev/null 2>&1; then
    say 'installing cargo-fuzz below target/'
    CARGO_TARGET_DIR=target/tools/build RUSTC_BOOTSTRAP=0 \
        cargo install --locked --quiet --root target/tools cargo-fuzz
    rm -rf target/tools/build
fi
say 'building (instrumented, some minutes the first time)'
cargo fuzz build --fuzz-dir tests/fuzz --sanitizer none >&2

worst=0
for target in "${targets[@]}"; do
    corpus=$dir/corpus/$target seeds=$dir/seeds/$target found=$dir/artifacts/$target
    rm -rf "$seeds"
    mkdir -p "$corpus" "$seeds" "$found"
    for seed in tests/fuzz/seeds/"$target"/*; do
        case $seed in
        # Bytes that are no text.
        *.hex) python3 -c 'import sys; sys.stdout.buffer.write(bytes.fromhex(sys.stdin.read()))' \
            <"$seed" >"$seeds/$(basename "$seed" .hex)" ;;
        *) cp "$seed" "$seeds/" ;;
        esac
    done
    log=$dir/$target.log
    # SIGBUS is the relay's.
    if "$dir"/*/release/"$target" "$corpus" "$seeds" -artifact_prefix="$found/" -dict=tests/fuzz/json.dict \
        -max_total_time="$seconds" -timeout=60 -rss_limit_mb=2048 -handle_bus=0 -print_final_stats=1 \
        >"$log" 2>&1; then
        runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -1)
        printf '%-10s %9d runs in %d s, %5d edges reached, %d seeds: nothing found\n' \
            "$target" "$runs" "$seconds" "$edges" "$(find "$seeds" -type f | wc -l)"
    else
        worst=1
        grep -vE '^(#[0-9]+|INFO:)' "$log" | grep -v '# Uses:' | tail -40 >&2 || true
        printf '%-10s FAILED; again: %s %s\n' "$target" "$(echo "$dir"/*/release/"$target")" \
            "$(find "$found" -type f -newer "$seeds" | head -1)"
    fi
done
exit $worst
