#!/usr/bin/env bash
# The lab's scenarios over and over: what happens once in a hundred times happens here.
# SOAK_ROUNDS (10)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
rounds=${SOAK_ROUNDS:-10}
[[ $rounds =~ ^[1-9][0-9]*$ ]] || { echo "SOAK_ROUNDS=$rounds is not a number above 0" >&2; exit 2; }
binary=$(cargo test --release --locked --no-run -p mce-relay-tests --test scenarios 2>&1 |
    sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
[ -n "$binary" ] || { echo 'the scenarios do not build' >&2; exit 1; }
failed=0
for ((round = 1; round <= rounds; round++)); do
    echo "==== round $round of $rounds" >&2
    tests/lab/run.sh target/release/hold "$binary" || failed=$((failed + 1))
done
echo "$((rounds - failed)) rounds passed, $failed failed"
[ "$failed" = 0 ]
