#!/usr/bin/env bash
# All three tiers, and at the end what was run and what was not.
#   tier 1  pure: units, properties, the relay with forged signals
#   tier 2  this machine's /dev/kvm, with payloads of a few instructions; what an exit costs; bad input
#   tier 3  the lab: tiers 1 (but for loom and histories) and 2 again, then real poison under real guests; some of these on
#           an Intel host, and with the newest kernel on host and guest, too
# MCE_RELAY_CI_RETRY=1 runs what failed in the lab there once more (.ci/run, and nobody else).
# NATIVE=1 runs tier 3 on this host instead: it poisons this host's memory.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

passed=0 failed=0 skipped=0 number=0 summary='' failures=() flaky=()
out=target/tests # the output of each tier, and of what failed once
rm -rf "$out"
mkdir -p "$out"
reports=$out/reports
: >"$reports"

# Runs a command, shows its output, and counts what it says (see report.awk).
tier() { # here|lab name command...
    local where=$1 name=$2 log status report p s key test bad=() left=()
    shift 2
    number=$((number + 1))
    log=$out/$number.log
    printf '\n==== %s\n' "$name" >&2
    "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    report=$(awk -f tests/report.awk "$log")
    printf '%s\n' "$report" >>"$reports"
    p=$(sum passed "$report") s=$(sum skipped "$report")
    mapfile -t bad < <(sed -n 's/^failed\t//p' <<<"$report")
    if [ "$status" != 0 ] && [ ${#bad[@]} = 0 ]; then
        bad=($'\t'"exit status $status without a failed test") # it died before it could count
    elif [ "$status" = 0 ] && [ $((p + s)) = 0 ]; then
        bad=($'\t''ran no test at all')
    fi
    for test in "${bad[@]}"; do
        key=${test%%$'\t'*} test=${test#*$'\t'}
        [ -n "$test" ] || test=$name
        if [ "$where" = lab ] && [ -n "$key" ] && may_be_accidents "${bad[@]}" && passes_now "$key" "$test" "$log"; then
            p=$((p + 1))
        else
            left+=("$name: $(readable "$key" "$test")$(reason "$test" "$log")")
        fi
    done
    failures+=("${left[@]}")
    passed=$((passed + p)) failed=$((failed + ${#left[@]})) skipped=$((skipped + s))
    summary+=$(printf '%-46s %4d passed %4d failed %4d skipped   exit status %d' "$name" "$p" "${#left[@]}" "$s" "$status")$'\n'
}
sum() { awk -v what="$1" '$1 == what { n += $2 } END { print n + 0 }' <<<"$2"; }

# A test's name for people, of the key and name that report.awk has.
readable() { # key test
    case $1 in
    *' '*) [[ $2 == *' '* ]] && printf '%s %s' "${1#* }" "$2" || printf '%s' "$2" ;;
    *) printf '%s%s' "${1:+$(basename "$1" | sed 's/-[0-9a-f]*$//') }" "$2" ;;
    esac
}

# The first line of what a failed test said, and where it stands.
reason() { # test log
    awk -v test="$1" '
        /^---- .* stdout ----$/ || /^test / { on = $2 == test }
        on && /panicked at / { sub(/.*panicked at /, ""); where = $0; getline; printf "; %s %s", where, substr($0, 1, 200); exit }
    ' "$2"
}

# More than these that fail are no accident: tests, and those that gave no result since their lab had died.
MOST=5 MOST_WITHOUT=15
may_be_accidents() { # failed...
    local without
    without=$(printf '%s\n' "$@" | grep -c $'\tgave no result$')
    [ "$without" -le $MOST_WITHOUT ] && [ $(($# - without)) -le $MOST ]
}

# MCE_RELAY_CI_RETRY=1 (.ci/run sets it): what has failed in the lab is run there once more, alone. If it passes
# the run goes on, but each such line is a defect that has to be found, so what there is of it is kept.
passes_now() { # key test log
    local binary=${1%% *} only='' name evidence status
    [ "${MCE_RELAY_CI_RETRY:-}" = 1 ] || return 1
    case $1 in *' '*) only=${1#* } ;; esac
    [[ $2 == *' '* ]] || only=$2
    name=$(readable "$1" "$2")
    evidence=$out/flaky.$((${#flaky[@]} + 1)).log
    awk -v key="binary: $1" '/^binary: / { on = $0 == key } on' "$3" >"$evidence"
    printf '\n==== once more, as it failed: %s\n' "$name" >&2
    tests/lab/run.sh target/release/hold "$binary" ${only:+--exact "$only"} >"$evidence.again" 2>&1
    status=$?
    awk -f tests/report.awk "$evidence.again" | grep -E '^(death|again)' >>"$reports"
    if [ "$status" != 0 ]; then
        cat "$evidence.again"
        return 1
    fi
    flaky+=("$name$(reason "$2" "$evidence"); it passed when it was run once more; the first output: $evidence")
    printf 'FLAKY %s\n' "${flaky[-1]}"
    printf '  its last lines:\n'
    tail -n 25 "$evidence" | sed 's/^/  | /'
}

# The test binaries, as cargo names them. Exactly what `make build` has built: another choice of packages or
# features would have cargo build much of it again.
mapfile -t binaries < <(cargo test --release --locked --no-run --workspace --exclude mce-relay-bench --bins --tests 2>&1 |
    sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
called() { printf '%s\n' "${binaries[@]}" | grep -E "/($1)-[0-9a-f]*$"; }
mapfile -t kvm < <(called 'kvm|quiet|bad_input')
mapfile -t scenarios < <(called scenarios)
# hwpoison is what the scenarios are, of the component alone, for an architecture without a VMM here (tests/arm.sh).
mapfile -t pure < <(printf '%s\n' "${binaries[@]}" | grep -vE '/(kvm|quiet|bad_input|scenarios|soak|hwpoison)-[0-9a-f]*$')
if [ ${#pure[@]} = 0 ] || [ ${#kvm[@]} != 3 ] || [ ${#scenarios[@]} != 1 ]; then
    echo "the test binaries are not there: cargo test --no-run failed" >&2
    exit 1
fi

# These depend on nothing of the machine, and take long on an emulated one.
mapfile -t again < <(printf '%s\n' "${pure[@]}" | grep -vE '/(loom|histories)-[^/]*$')

# One after the other; the status of the worst.
all() {
    local worst=0 binary
    printf 'planned: %s\n' "$@"
    for binary in "$@"; do
        echo "binary: $binary"
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
    printf 'planned: %s\n' "$@"
    # shellcheck disable=SC2016 # expanded inside
    tests/lab/run.sh target/release/hold sh -c \
        'worst=0; for binary; do echo "binary: $binary"; "$binary" || worst=$?; done; exit $worst' sh "$@"
}
# A few scenarios to a lab: when its emulator dies, little has to be done again.
in_labs() {
    local worst=0 names
    mapfile -t names < <("$1" --list | sed -n 's/: test$//p')
    printf 'planned: %s\n' "${names[@]/#/$1 }"
    while [ ${#names[@]} != 0 ]; do
        # shellcheck disable=SC2016 # expanded inside
        tests/lab/run.sh target/release/hold sh -c 'worst=0 binary=$1; shift
            for name; do echo "binary: $binary $name"; "$binary" --exact "$name" || worst=$?; done; exit $worst' \
            sh "$1" "${names[@]:0:12}" || worst=$?
        names=("${names[@]:12}")
    done
    return "$worst"
}
# The lab's other host, an Intel machine: KVM's own machine checks there, LMCE and the rendezvous, and AMD-style guests.
intel_names=(ao::intel_two_vcpus_by_rendezvous ao::intel_two_vcpus_by_lmce ar::intel_two_vcpus_by_lmce ar::amd_two_vcpus
    firmware::amd_two_vcpus)
in_intel_lab() {
    local status=0 name known
    printf 'planned: %s\n' "${intel_names[@]/#/$1 }"
    known=$("$1" --list)
    for name in "${intel_names[@]}"; do
        grep -qx "$name: test" <<<"$known" || { echo "there is no scenario $name"; return 1; }
    done
    # shellcheck disable=SC2016 # expanded inside
    LAB_TIMEOUT=${LAB_TIMEOUT:-1200} tests/lab/intel.sh target/release/hold sh -c 'worst=0 binary=$1; shift
        for name; do echo "binary: $binary $name"; "$binary" --exact "$name" || worst=$?; done; exit $worst' \
        sh "$1" "${intel_names[@]}" || status=$?
    [ "$status" = 77 ] || return "$status"
    for name in "${intel_names[@]}"; do
        printf 'binary: %s %s\n' "$1" "$name"
        printf 'SKIPPED %s: needs the Intel host, and so Bochs (Debian: bochs, bochs-term, bochsbios, vgabios, isolinux)\n' "$name (Intel host)"
        printf 'test result: ok. 0 passed; 0 failed; 1 ignored\n'
    done
}
# The newest kernel that is offered, as host and as guest; `make matrix` has all combinations.
newest=trixie-backports:newest
newest_names=(ao::amd_two_vcpus ar::amd_two_vcpus firmware::reboot rescue::by_a_touch memory::guest_memfd)
in_newest_lab() {
    local name image=guest-image-matrix-newest
    printf 'planned: %s\n' "${newest_names[@]/#/$1 }"
    if ! guest-image/kernel.sh "$newest" >/dev/null; then
        for name in "${newest_names[@]}"; do
            printf 'binary: %s %s\n' "$1" "$name"
            printf 'SKIPPED %s: the kernel %s cannot be had (see above)\n' "$name (newest kernel)" "$newest"
            printf 'test result: ok. 0 passed; 0 failed; 1 ignored\n'
        done
        return
    fi
    KERNEL=$newest GUEST_IMAGE_DIR=$PWD/target/$image guest-image/build.sh || return
    # shellcheck disable=SC2016 # expanded inside
    LAB_KERNEL=$newest MCE_RELAY_GUEST_IMAGE=$image tests/lab/run.sh target/release/hold sh -c 'worst=0 binary=$1; shift
        for name; do echo "binary: $binary $name"; "$binary" --exact "$name" || worst=$?; done; exit $worst' \
        sh "$1" "${newest_names[@]}"
}
tier here 'tier 1: pure' all "${pure[@]}"
tier here 'tier 1: examples in the documentation' examples
tier here 'tier 2: KVM, cost, bad input, on this machine' all "${kvm[@]}"
tier here 'tier 2: requests made from the OpenAPI document' tests/fuzz/api.sh 30
if [ "${NATIVE:-}" = 1 ]; then
    echo 'NATIVE=1: this poisons some 30 pages of this host, under guests started for it, and asks the kernel to' >&2
    echo 'take each back into use afterwards; it refuses if it has seen a real hardware error' >&2
    modprobe hwpoison-inject || true # the scenarios say what is missing
    MCE_RELAY_NATIVE=1 tier here 'tier 3: real poison, on this machine' all "${scenarios[@]}"
else
    tier lab 'tiers 1 and 2 again, in the lab' in_lab "${again[@]}" "${kvm[@]}"
    tier lab 'tier 3: real poison, in the lab' in_labs "${scenarios[@]}"
    tier here 'tier 3: real poison, on an Intel host in the lab' in_intel_lab "${scenarios[@]}"
    # Not tried again where it fails: that would be in the other lab.
    tier here 'tier 3: real poison, with the newest kernel' in_newest_lab "${scenarios[@]}"
fi

# Skipped tests by their reason, with their names.
awk -F '\t' '$1 == "skip" && !seen[$2, $3]++ { n[$3]++; names[$3] = names[$3] (n[$3] > 1 ? ", " : "") $2 }
    END { for (why in n) printf "skipped: %s: %s\n", why, names[why] }' "$reports" | sort | fold -s -w 120
# What is to be acted on comes last: some places show the end alone.
printf '\n%s' "$summary"
sed -n 's/^death\t/lab died: /p' "$reports"
[ ${#flaky[@]} = 0 ] || printf 'FLAKY: %s\n' "${flaky[@]}"
[ ${#failures[@]} = 0 ] || printf 'failed: %s\n' "${failures[@]}"
echo "$(grep -c '^death' "$reports") labs died; $(grep -c '^again' "$reports") guests stood still in their boot" \
    "and were booted again; ${#flaky[@]} flaky tests"
echo "the output is in $out/"
[ -z "${MCE_RELAY_CI_NOTE:-}" ] || echo "$MCE_RELAY_CI_NOTE"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
