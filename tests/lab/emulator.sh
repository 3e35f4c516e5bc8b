#!/usr/bin/env bash
# Prints the command of the QEMU that the lab runs on, and fetches it if need be.
#
# That is LAB_QEMU, if it is given; the installed one, if it loses no interrupts; else the one of SUITE, unpacked
# below target/peer/ and not installed; and if that is not to be had the installed one all the same, with a warning.
#
# usage: emulator.sh
set -euo pipefail

SUITE=trixie-backports
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
installed=qemu-system-x86_64
say() { printf 'tests/lab/emulator.sh: %s\n' "$*" >&2; }

if [ -n "${LAB_QEMU:-}" ]; then
    printf '%s\n' "$LAB_QEMU"
    exit 0
fi
# Before 10.2 a processor that leaves a guest can lose an interrupt that comes at that moment: do_vmexit() clears
# a bit of what is pending without the lock that the sender holds. DESIGN.md has what comes of it.
version=$("$installed" --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p') || version=
if [ -n "$version" ] && [ "$(printf '%s\n' 10.2 "$version" | sort -V | head -n 1)" = 10.2 ]; then
    printf '%s\n' "$installed"
    exit 0
fi
# One that was not to be had is not asked for again today.
store=$here/../../target/peer/$SUITE
if [ -z "$(find "$store/.missing" -mtime -1 2>/dev/null)" ]; then
    if "$here/../peer/qemu.sh" "$SUITE"; then
        exit 0
    fi
    mkdir -p "$store"
    touch "$store/.missing"
fi
say "warning: the lab runs on the installed QEMU ${version:-of an unknown version}, which may lose interrupts;" \
    "a guest or the lab may then stand still, and what failed is run again"
printf '%s\n' "$installed"
