#!/usr/bin/env bash
# Runs a handful of scenarios on each host kernel under each guest kernel, and writes what came of it to docs/kernels.md.
#
# usage: matrix.sh [CELL]     CELL, 1 to the number of hosts times that of guests: that one alone, and the table stays as it is
#
# MATRIX_KERNELS   what kernel.sh is asked for, for hosts and guests (default newest trixie-backports:newest); two that turn out
#                  to be the same count once
#
# Exit status: 0 if each scenario of each cell passed, or was skipped for a reason of its own; 1 also where a cell was not run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
read -ra wishes <<<"${MATRIX_KERNELS:-default newest trixie-backports:newest}"
only=${1:-}
columns=('AMD-style: AO' ao::amd_two_vcpus 'AR' ar::amd_two_vcpus 'burst' burst::amd 'firmware-first' firmware::amd_two_vcpus
    'Intel-style: AO' ao::intel_two_vcpus_by_lmce 'AR' ar::intel_two_vcpus_by_lmce 'burst' burst::intel_by_lmce
    'firmware-first' firmware::intel_two_vcpus 'reboot' firmware::reboot 'huge page: AO' rescue::of_2_mib 'AR' rescue::by_a_touch 'lost whole' memory::hugetlb 'guest_memfd' memory::guest_memfd)
names=() heads=()
for ((i = 0; i < ${#columns[@]}; i += 2)); do heads+=("${columns[i]}") names+=("${columns[i + 1]}"); done

say() { printf 'matrix: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

scenarios=$(cargo test --release --locked --no-run -p mce-relay-tests --test scenarios 2>&1 |
    sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
[ -n "$scenarios" ] || die 'the scenarios do not build: cargo test --no-run failed'
known=$("$scenarios" --list)
for name in "${names[@]}"; do grep -qx "$name: test" <<<"$known" || die "there is no scenario $name"; done

# A wish, its version and why it cannot be had, by its place.
kernels=() versions=() missing=()
for wish in "${wishes[@]}"; do
    if dir=$(guest-image/kernel.sh "$wish"); then
        version=$(cat "$dir/version")
        [[ " ${versions[*]:-} " != *" $version "* ]] || continue
        kernels+=("$wish") versions+=("$version") missing+=('')
    else
        say "SKIPPED $wish: it cannot be had (see above)"
        kernels+=("$wish") versions+=("$wish") missing+=('this kernel cannot be had')
    fi
done

out=target/tests/matrix
mkdir -p "$out"

reasons=()
note() { # a reason: its number is left in $noted
    local i
    for ((i = 0; i < ${#reasons[@]}; i++)); do [ "${reasons[i]}" != "$1" ] || break; done
    reasons[i]=$1
    noted=$((i + 1))
}
cells=$((${#kernels[@]} * ${#kernels[@]}))
[ -n "$only" ] || rm -f "$out"/*.log
[ -z "$only" ] || [[ $only =~ ^[1-9][0-9]*$ && $only -le $cells ]] || die "CELL=$only is not a number from 1 to $cells"
failed=0 number=0 table=()
for ((host = 0; host < ${#kernels[@]}; host++)); do
    for ((guest = 0; guest < ${#kernels[@]}; guest++)); do
        number=$((number + 1))
        [ -z "$only" ] || [ "$only" = "$number" ] || continue
        row="| ${versions[host]} | ${versions[guest]} |"
        why=${missing[host]:-${missing[guest]}}
        log=$out/$number.log
        rm -f "$log"
        if [ -z "$why" ]; then
            say "$number of $cells: host Linux ${versions[host]}, guest Linux ${versions[guest]}"
            image=guest-image-matrix-$guest
            KERNEL=${kernels[guest]} GUEST_IMAGE_DIR=$PWD/target/$image guest-image/build.sh || why='the guest does not build'
        fi
        if [ -z "$why" ]; then
            # shellcheck disable=SC2016 # expanded inside
            LAB_KERNEL=${kernels[host]} LAB_TIMEOUT=${LAB_TIMEOUT:-900} MCE_RELAY_GUEST_IMAGE=$image \
                tests/lab/run.sh target/release/hold sh -c 'echo "host: $(uname -r)"; binary=$1; shift
                    for name; do echo "cell: $name begun"; if "$binary" --exact "$name"; then echo "cell: $name passed"; else echo "cell: $name failed"; fi; done' \
                sh "$scenarios" "${names[@]}" >"$log" 2>&1
            grep -qx "host: ${versions[host]}" "$log" || why='the lab does not start on this host kernel'
        fi
        for name in "${names[@]}"; do
            # What was run again after the lab had died counts as it ended.
            if [ -n "$why" ]; then
                note "$why"
                row+=" not run ($noted) |"
                failed=$((failed + 1))
            elif grep -q "^SKIPPED $name: " "$log"; then
                note "$(sed -n "s/^SKIPPED $name: //p" "$log" | tail -1)"
                row+=" skipped ($noted) |"
            elif [ "$(grep "^cell: $name " "$log" | tail -1)" = "cell: $name passed" ]; then
                row+=' ✓ |'
            else
                row+=' **failed** |'
                failed=$((failed + 1))
                say "failed: $name, host ${versions[host]}, guest ${versions[guest]}; the output is in $log"
            fi
        done
        table+=("$row")
    done
done
page=docs/kernels.md
[ -z "$only" ] || page=$out/kernels.md
{
    echo '# Which kernels, on hosts and in guests'
    echo
    echo 'Made by `make matrix`: on each host kernel, under each guest kernel, real pages are poisoned and the guest says in its own'
    echo 'log what it has learned. The hosts are emulated AMD machines, the kernels those that Debian offers.'
    echo
    printf '| host | guest |'; printf ' %s |' "${heads[@]}"; echo
    printf '|---|---|'; for _ in "${heads[@]}"; do printf '%s' '---|'; done; echo
    printf '%s\n' "${table[@]}"
    echo
    for ((i = 0; i < ${#reasons[@]}; i++)); do printf '(%s) %s.\n\n' $((i + 1)) "${reasons[i]}"; done
    printf 'Run on %s, in the emulator: %s.\n' "$(date -u +%F)" \
        "$(sed -n 's/^lab: emulator: //p' "$out"/*.log 2>/dev/null | sort -u | head -1)"
} >"$page"
say "$page is written; $failed of $((${#table[@]} * ${#names[@]})) failed"
[ "$failed" = 0 ]
