#!/usr/bin/env bash
# The lab under each QEMU that it is meant for: the installed one, and those that Debian has in other suites,
# unpacked below target/peer/. For each the show with both vendors, and a handful of scenarios.
#
# usage: emulators.sh [SUITE...]     e.g. trixie-backports; without: the suites below
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

suites=("$@")
[ $# != 0 ] || suites=('' bookworm-backports trixie trixie-backports) # '': the installed one
names=(ao::amd_two_vcpus ao::intel_two_vcpus_by_rendezvous memory::hugetlb burst::intel_by_lmce)
scenarios=$(cargo test --release --locked --no-run -p mce-relay-tests --test scenarios 2>&1 |
    sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
[ -n "$scenarios" ] || { echo 'the scenarios do not build' >&2; exit 1; }

passed=0 failed=0
in_lab() { # what, command...
    local what=$1 status=0
    shift
    tests/lab/run.sh target/release/hold "$@" || status=$?
    if [ "$status" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    printf '==== %s: %s: exit status %s\n' "${suite:-installed}" "$what" "$status" >&2
}
for suite in "${suites[@]}"; do
    export LAB_QEMU=
    if [ -n "$suite" ] && ! LAB_QEMU=$(tests/peer/qemu.sh "$suite"); then
        failed=$((failed + 1))
        continue
    fi
    for vendor in intel amd; do
        MCE_RELAY_VENDOR=$vendor in_lab "show, $vendor" target/release/show
    done
    # shellcheck disable=SC2016 # expanded inside
    in_lab scenarios sh -c 'worst=0 binary=$1; shift
        for name; do "$binary" --exact "$name" || worst=$?; done; exit $worst' sh "$scenarios" "${names[@]}"
done
echo "$passed runs passed, $failed failed"
[ "$failed" = 0 ]
