#!/usr/bin/env bash
# Tier 2 and the scenarios on the lab's Intel host, which Bochs emulates (tests/lab/intel.sh): an hour.
#
# usage: intel.sh [NAME...]     names of tests of tier 2 (kvm) or of scenarios; without any, all that can be run there
#
# Each lab runs some of them, one after the other. A test that gives no result in time, or takes the host along, has hung; the
# next lab goes on behind it.
#
# Exit status: 0 if all passed; 77 if there is no Bochs here.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
AT_ONCE=12    # tests to a lab
SECONDS_EACH=150

# What cannot be there, and why: a pattern and a reason.
cannot=(
    'debian::*' 'the disk of a Debian guest is larger than the memory of this host'
    'first_hour::*' 'there is no shell to type in on this host, nor the documents'
    'rescue::of_1_gib' 'this host has 2 GiB of memory'
    'watch::the_guest_of_another_vmm_lives' 'there is no QEMU on this host'
    'net::*' 'there are no tools for a network on this host'
    'bad_queues::net*' 'there are no tools for a network on this host'
    'embed::*' 'the sources of the example are not on this host'
)

say() { printf 'intel: %s\n' "$*" >&2; }
executable() {
    cargo test --release --locked --no-run -p mce-relay-tests --test "$1" 2>&1 | sed -n 's/^ *Executable .*(\(.*\))$/\1/p'
}
kvm=$(executable kvm) scenarios=$(executable scenarios)
[ -n "$kvm" ] && [ -n "$scenarios" ] || { say 'the tests do not build: cargo test --no-run failed'; exit 1; }
tests/lab/intel.sh --setup || exit

names() { "$1" --list | sed -n 's/: test$//p'; }
reason() { # why this test cannot be there
    local i
    for ((i = 0; i < ${#cannot[@]}; i += 2)); do
        # shellcheck disable=SC2053 # it is a pattern
        [[ $1 != ${cannot[i]} ]] || { printf '%s\n' "${cannot[i + 1]}"; return; }
    done
}
wanted=("$@") known=$(names "$kvm"; names "$scenarios")
for name in "${wanted[@]}"; do
    grep -qxF "$name" <<<"$known" || { say "error: neither tier 2 nor the scenarios have a test $name"; exit 1; }
done

out=target/tests/intel passed=0 failures=() skipped=0 labs=0
mkdir -p "$out"
# The tests that are left of one binary, in labs of their own.
run() { # binary
    local binary=$1 left=() name why log result
    for name in $(names "$binary"); do
        [ ${#wanted[@]} = 0 ] || [[ " ${wanted[*]} " == *" $name "* ]] || continue
        why=$(reason "$name")
        if [ -n "$why" ]; then
            printf 'SKIPPED %s (Intel host): %s\n' "$name" "$why"
            skipped=$((skipped + 1))
        else
            left+=("$name")
        fi
    done
    while [ ${#left[@]} != 0 ]; do
        labs=$((labs + 1))
        log=$out/$labs.log
        # shellcheck disable=SC2016 # expanded inside
        LAB_TIMEOUT=$((120 + SECONDS_EACH * (${#left[@]} < AT_ONCE ? ${#left[@]} : AT_ONCE))) \
            LAB_FILES="${LAB_FILES:-} $(find target/release -maxdepth 1 -name 'lib*.so' | tr '\n' ' ')" \
            tests/lab/intel.sh target/release/hold sh -c 'binary=$1; shift
                for name; do echo "begins: $name"; "$binary" --exact "$name"; echo "ended: $name $?"; done' \
            sh "$binary" "${left[@]:0:AT_ONCE}" 2>&1 | tee "$log"
        local next=() any=
        for name in "${left[@]:0:AT_ONCE}"; do
            result=$(sed -n "s/^ended: ${name} //p" "$log" | tail -n 1)
            if [ -z "$result" ] && [ -z "$any" ] && grep -qx "begins: $name" "$log"; then
                failures+=("$name: it has hung, or taken the host along") any=1
            elif [ -z "$result" ]; then
                next+=("$name")
            elif grep -q "^SKIPPED $name: " "$log"; then
                skipped=$((skipped + 1)) any=1
            elif [ "$result" = 0 ]; then
                passed=$((passed + 1)) any=1
            else
                failures+=("$name") any=1
            fi
        done
        if [ -z "$any" ]; then
            failures+=("${next[@]/%/: the lab did not start}")
            next=()
        fi
        left=("${next[@]}" "${left[@]:AT_ONCE}")
    done
}
run "$kvm"
run "$scenarios"
[ ${#failures[@]} = 0 ] || printf 'failed: %s\n' "${failures[@]}"
echo "on the Intel host: $passed passed, ${#failures[@]} failed, $skipped skipped; $labs labs; the output is in $out/"
[ ${#failures[@]} = 0 ]
