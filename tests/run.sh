#!/usr/bin/env bash
# All three tiers, and at the end what was run and what was not.
#   tier 1  pure: units, properties, the relay with forged signals
#   tier 2  this machine's /dev/kvm, with payloads of a few instructions; what an exit costs; bad input
#   tier 3  the lab: tiers 1 (but for loom and histories) and 2 again, then real poison under real guests
# NATIVE=1 runs tier 3 on this host instead: it poisons this host's memory.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

passed=0 failed=0 skipped=0 booted=0 summary=''
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Runs a command, shows its output, and counts what its runners' closing lines say.
tier() { # name command...
    local name=$1 status p f s
    shift
    printf '\n==== %s\n' "$name" >&2
    "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    # What was counted before the lab had to be started over does not count.
    count() {
        awk -v what="$1" '
            /^lab: ready after/ && !over { all += n; n = 0 }
            /^lab: .*starting the lab over/ { n = 0; over = 1 }
            /^test result: / { over = 0; for (i = 2; i <= NF; i++) if ($i ~ "^" what) n += $(i - 1) }
            END { print all + n }' "$log"
    }
    p=$(count passed) f=$(count failed) s=$(count ignored)
    booted=$((booted + $(grep -c 'BOOTED AGAIN: ' "$log")))
    if [ "$status" != 0 ] && [ "$f" = 0 ]; then
        f=1 # it died before it could count
    elif [ "$status" = 0 ] && [ $((p + s)) = 0 ]; then
        f=1 # it ran nothing at all
    fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    summary+=$(printf '%-46s %4d passed %4d failed %4d skipped   exit status %d' "$name" "$p" "$f" "$s" "$status")$'\n'
}

# The test binaries, as cargo names them.
executables() { # cargo-arguments...
    cargo test --release --locked --no-run "$@" 2>&1 |
        sed -n 's/^ *Executable .*(\(.*\))$/\1/p'
}

mapfile -t pure < <(executables --workspace --exclude mce-relay-bench --all-features --lib --bins; executables -p mce-relay --all-features --test '*'; executables -p mce-relay-agent --test '*'; executables -p mce-relay-tests --test histories)
mapfile -t kvm < <(executables -p mce-relay-tests --test kvm --test quiet --test bad_input)
mapfile -t scenarios < <(executables -p mce-relay-tests --test scenarios)
if [ ${#pure[@]} = 0 ] || [ ${#kvm[@]} != 3 ] || [ ${#scenarios[@]} != 1 ]; then
    echo "the test binaries are not there: cargo test --no-run failed" >&2
    exit 1
fi

# These depend on nothing of the machine, and take long on an emulated one.
mapfile -t again < <(printf '%s\n' "${pure[@]}" | grep -vE '/(loom|histories)-[^/]*$')

# One after the other; the status of the worst.
all() {
    local worst=0 binary
    for binary in "$@"; do
        "$binary" || worst=$?
    done
    return "$worst"
}
examples() {
    cargo test --release --locked --quiet -p mce-relay --all-features --doc &&
        cargo test --release --locked --quiet -p mce-relay-tests --doc
}
# The same in the lab, as one command there.
in_lab() {
    # shellcheck disable=SC2016 # expanded inside
    tests/lab/run.sh target/release/hold sh -c \
        'worst=0; for binary; do "$binary" || worst=$?; done; exit $worst' sh "$@"
}
# A few scenarios to a lab: when its emulator dies, little has to be done again.
in_labs() {
    local worst=0 names
    mapfile -t names < <("$1" --list | sed -n 's/: test$//p')
    while [ ${#names[@]} != 0 ]; do
        # shellcheck disable=SC2016 # expanded inside
        tests/lab/run.sh target/release/hold sh -c 'worst=0 binary=$1; shift
            for name; do "$binary" --exact "$name" || worst=$?; done; exit $worst' \
            sh "$1" "${names[@]:0:12}" || worst=$?
        names=("${names[@]:12}")
    done
    return "$worst"
}
tier 'tier 1: pure' all "${pure[@]}"
tier 'tier 1: examples in the documentation' examples
tier 'tier 2: KVM, cost, bad input, on this machine' all "${kvm[@]}"
tier 'tier 2: requests made from the OpenAPI document' tests/fuzz/api.sh 30
if [ "${NATIVE:-}" = 1 ]; then
    echo 'NATIVE=1: this poisons some 30 pages of this host, under guests started for it, and asks the kernel to' >&2
    echo 'take each back into use afterwards; it refuses if it has seen a real hardware error' >&2
    modprobe hwpoison-inject || true # the scenarios say what is missing
    MCE_RELAY_NATIVE=1 tier 'tier 3: real poison, on this machine' all "${scenarios[@]}"
else
    tier 'tiers 1 and 2 again, in the lab' in_lab "${again[@]}" "${kvm[@]}"
    tier 'tier 3: real poison, in the lab' in_labs "${scenarios[@]}"
fi

printf '\n%s' "$summary"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$booted" = 0 ] || echo "$booted guests stood still in their boot and were booted again: look for BOOTED AGAIN above"
[ "$failed" = 0 ]
