#!/usr/bin/env bash
# What takes too long for `make test`: a minute of 1,000 events a second and random histories, on this machine; then in the lab
# large bursts, and random poison and touches on guests with four vCPUs; then the scenarios over and over,
# as what happens once in a hundred times happens here; the component on an aarch64 host; tier 2
# and the scenarios on an Intel host; and a few of them with every kernel.
# SOAK_MINUTES   of random poison, for each of its guests (10)
# SOAK_SEED      for the same random choices as in an earlier run
# SOAK_ROUNDS    of the scenarios (10); 0 leaves them out
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
minutes=${SOAK_MINUTES:-10} rounds=${SOAK_ROUNDS:-10}
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "SOAK_MINUTES=$minutes is not a number above 0" >&2; exit 2; }
[[ $rounds =~ ^[0-9]+$ ]] || { echo "SOAK_ROUNDS=$rounds is not a number" >&2; exit 2; }
[[ ${SOAK_SEED:=} =~ ^[0-9]*$ ]] || { echo "SOAK_SEED=$SOAK_SEED is not a number" >&2; exit 2; }
export MCE_RELAY_SOAK=1 MCE_RELAY_SOAK_MINUTES=$minutes
[ -z "$SOAK_SEED" ] || export MCE_RELAY_SOAK_SEED=$SOAK_SEED

guest-image/debian.sh || exit 1
KERNEL=newest GUEST_IMAGE_DIR=$PWD/target/guest-image-newest guest-image/build.sh || exit 1

executable() { # test target
    cargo test --release --locked --no-run -p mce-relay-tests --test "$1" 2>&1 |
        sed -n 's/^ *Executable .*(\(.*\))$/\1/p'
}
soak=$(executable soak) scenarios=$(executable scenarios) bad_input=$(executable bad_input)
histories=$(executable histories)
[ -n "$soak" ] && [ -n "$scenarios" ] && [ -n "$bad_input" ] && [ -n "$histories" ] || { echo 'the tests do not build' >&2; exit 1; }

failed=0 all=0 failures=()
in_lab() { # what, command...
    local what=$1
    echo "==== $what" >&2
    shift
    all=$((all + 1))
    # More than a lab has for the tests: some of it in pages of 1 GiB.
    LAB_MEMORY=${LAB_MEMORY:-8G} tests/lab/run.sh target/release/hold "$@" || {
        failed=$((failed + 1))
        failures+=("$what")
    }
}
# It takes a real machine's time to make that many, and nothing in it depends on the kernel.
name=followers::three_of_them_one_stuck
echo "==== $name" >&2
all=$((all + 1))
"$bad_input" --exact "$name" --nocapture || { failed=$((failed + 1)); failures+=("$name"); }
# A few million steps each, by seeds of their own.
for ((round = 1; round <= 5; round++)); do
    seed=${SOAK_SEED:-$RANDOM}$round
    echo "==== histories, PROPTEST_RNG_SEED=$seed" >&2
    all=$((all + 1))
    PROPTEST_RNG_SEED=$seed "$histories" model || { failed=$((failed + 1)); failures+=("histories, seed $seed"); }
done
# Each in a lab of its own. Its clock can be half as fast as ours, and a burst has ten minutes as well.
names=$("$soak" --list | sed -n 's/: test$//p')
for name in $names; do
    LAB_TIMEOUT=$((minutes * 120 + 1800)) in_lab "$name" "$soak" --exact "$name" --nocapture
done
for ((round = 1; round <= rounds; round++)); do
    LAB_TIMEOUT=3600 in_lab "round $round of $rounds" "$scenarios"
done
for other in arm intel matrix; do
    echo "==== make $other" >&2
    all=$((all + 1))
    "tests/$other.sh" || { failed=$((failed + 1)); failures+=("make $other"); }
done
[ $failed = 0 ] || printf 'failed: %s\n' "${failures[@]}"
echo "$((all - failed)) runs passed, $failed failed"
[ "$failed" = 0 ]
