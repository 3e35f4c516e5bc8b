#!/usr/bin/env bash
# Whether packaging/mce-relay@.service is sound: systemd knows all that it says, rates its exposure below 3.0 (of 10), and the
# unit's filter of system calls lets through whatever the VMM's own filters do. Nothing is started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unit=packaging/mce-relay@.service

die() { printf 'tests/service.sh: error: %s\n' "$*" >&2; exit 1; }
if ! systemd-analyze security --help 2>/dev/null | grep -q -- --offline; then
    echo 'SKIPPED the unit of systemd: there is no systemd-analyze that reads files (systemd 250 or newer)' >&2
    exit 0
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# A root with the programs that the unit names, and the targets that every unit waits for.
mkdir -p "$tmp/root"/{bin,usr/bin,lib/systemd/system}
install -m 755 /dev/null "$tmp/root/bin/kill"
install -m 755 /dev/null "$tmp/root/usr/bin/mce-relay"
cp "$unit" "$tmp/root/lib/systemd/system/"
for name in basic network shutdown sysinit multi-user; do
    printf '[Unit]\nDescription=%s\n' "$name" >"$tmp/root/lib/systemd/system/$name.target"
done
systemd-analyze verify --root="$tmp/root" --man=no --recursive-errors=no mce-relay@vm1.service 2>"$tmp/verify" ||
    die "systemd-analyze verify does not take $unit: $(cat "$tmp/verify")"
[ ! -s "$tmp/verify" ] || die "systemd-analyze verify says of $unit: $(cat "$tmp/verify")"

# The threshold is in tenths, and what is above it fails.
systemd-analyze security --offline=true --threshold=29 --no-pager "$unit" >"$tmp/security" ||
    die "the exposure of $unit is 3.0 or more: $(grep -v '✓' "$tmp/security")"

calls() { # from words of a SystemCallFilter, one a line; of a set (@NAME) those that this systemd has in it
    local word
    while read -r word; do
        case $word in
        @*) systemd-analyze syscall-filter "$word" | sed '1d; s/^ *//; /^#/d' | calls ;;
        *) printf '%s\n' "$word" ;;
        esac
    done
}
sed -n 's/^SystemCallFilter=\([^~]\)/\1/p' "$unit" | tr ' ' '\n' | calls | sort -u >"$tmp/allowed"
sed -n 's/^SystemCallFilter=~//p' "$unit" | tr ' ' '\n' | calls | sort -u >"$tmp/denied"
for list in vmm/src/sandbox/seccomp.rs relay/src/syscalls.rs; do
    sed '/^#\[cfg(test)\]/,$d' "$list" # the tests name calls that are on no list
done | grep -oE 'SYS_[a-z0-9_]+' | sed 's/^SYS_//' | sort -u >"$tmp/needed"
[ "$(wc -l <"$tmp/needed")" -gt 50 ] || die "vmm/src/sandbox/seccomp.rs does not name its calls as SYS_NAME any more"
refused=$(comm -13 <(comm -23 "$tmp/allowed" "$tmp/denied") "$tmp/needed" | tr '\n' ' ')
[ -z "$refused" ] || die "SystemCallFilter of $unit refuses what the VMM needs: $refused"

echo "the unit: $(sed -n 's/.*Overall exposure.*: \([0-9.]*\).*/exposure \1 of 10/p' "$tmp/security")," \
    "all $(wc -l <"$tmp/needed") system calls of the VMM allowed"
