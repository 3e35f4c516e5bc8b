#!/usr/bin/env bash
# Runs a command in the lab's Arm host: an emulated aarch64 machine with a stock Debian kernel, so with KVM and memory failure. Of
# this machine's files it has this checkout, read-only, at the same place.
#
# usage: aarch64.sh COMMAND [ARGUMENT...]
#        aarch64.sh --setup      only installs what this needs
#
# LAB_TIMEOUT  seconds after which a run is ended (1500)
# LAB_MEMORY   memory of the lab (2G)
# LAB_CPU      its processor, by QEMU's name (cortex-a76)
# LAB_KERNEL   its kernel package (the newest that is offered)
# MCE_RELAY_*, RUST_LOG and RUST_BACKTRACE reach the command. It also finds MCE_RELAY_LAB=1 and MCE_RELAY_LAB_EMULATOR.
#
# Programs there are busybox and what was built for that machine, linked statically (tests/arm.sh does). What the command
# prints, on either stream, comes out here on standard output; it reads nothing.
#
# Exit status: that of the command (128+N for signal N); 77 the emulator or the kernel cannot be had here; 124 time limit;
# 125 the lab failed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd -P)
lab=$top/target/lab/aarch64
limit=${LAB_TIMEOUT:-1500}
cpu=${LAB_CPU:-cortex-a76}

say() { printf 'lab: %s\n' "$*" >&2; }
fail() { say "error: $*"; exit 125; }
missing() { say "error: $*"; exit 77; }

[ $# != 0 ] || fail "usage: aarch64.sh COMMAND [ARGUMENT...]"
[[ $limit =~ ^[1-9][0-9]*$ ]] || fail "LAB_TIMEOUT=$limit is not a number of seconds above 0"
[[ ${LAB_MEMORY:=2G} =~ ^[1-9][0-9]*[MG]$ ]] || fail "LAB_MEMORY=$LAB_MEMORY is not a size such as 2G or 2048M"
NEED="qemu-system-aarch64:qemu-system-arm dpkg-deb:dpkg" "$here/setup.sh" ||
    missing "qemu-system-aarch64 could not be installed (see above)"
KERNEL_ARCH=arm64 "$top/guest-image/kernel.sh" "${LAB_KERNEL:-newest}" >/dev/null ||
    missing "a kernel for arm64 could not be had (see above)"
LAB_ARCH=arm64 LAB_MODULES='9pnet_virtio 9p hwpoison-inject' LAB_OUT=$lab/host "$here/build.sh" ||
    fail "the lab could not be built (see above)"
[ "$1" != --setup ] || exit 0
exec 8>"$lab/.lock"
flock -n 8 || { say "another run is under way in this checkout, waiting for it"; flock 8; }
SECONDS=0

emulator='' tail=''
job=$(mktemp -d "${TMPDIR:-/tmp}/mce-relay-lab.XXXXXX")
stop() {
    [ -n "$emulator" ] || return 0
    kill -9 "$emulator" 2>/dev/null || true
    wait "$emulator" 2>/dev/null || true
    emulator=''
    [ -z "$tail" ] || wait "$tail" 2>/dev/null || true # it ends by itself, with the last output
    tail=''
}
# shellcheck disable=SC2317 # called by the trap
leave() {
    stop
    rm -rf "$job"
}
trap leave EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

quote() {
    local word=${1//\'/\'\\\'\'}
    printf "'%s'" "$word"
}
version=$(qemu-system-aarch64 --version | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p')
export MCE_RELAY_LAB_EMULATOR="QEMU $version, $cpu"
mkdir "$job/root"
{
    printf 'mkdir -p %s && mount -t 9p -o ro,cache=loose,trans=virtio,version=9p2000.L,msize=512000 checkout %s || exit 125\n' \
        "$(quote "$top")" "$(quote "$top")"
    for name in $(compgen -e | grep -E '^(MCE_RELAY_[A-Za-z0-9_]*|RUST_LOG|RUST_BACKTRACE)$' | grep -vE '^MCE_RELAY_LAB(_OUT|_MONITOR)?$'); do
        printf 'export %s=%s\n' "$name" "$(quote "${!name}")"
    done
    printf 'cd %s || exit 125\nexec' "$(quote "$top")"
    for word; do printf ' %s' "$(quote "$word")"; done
    printf '\n'
} >"$job/root/command"
install -m 755 "$here/bare-init" "$job/root/init"
# The archives are read one behind the other: what the kernel's package gives, and what this run needs.
(cd "$job/root" && find . | cpio --quiet -o -H newc -R 0:0) >"$job/run.cpio"
cat "$lab/host/initramfs.cpio" "$job/run.cpio" >"$job/initrd"
say "emulator: $MCE_RELAY_LAB_EMULATOR"

start() {
    : >"$lab/output.log"
    : >"$lab/console.log"
    local out=${lab//,/,,} share=${top//,/,,} # QEMU's quoting
    # oops=panic, panic=-1 and -no-reboot: QEMU ends when the lab's kernel is hit.
    # shellcheck disable=SC2054 # the commas are QEMU's
    local args=(
        -nodefaults -no-user-config -display none -no-reboot
        -machine "virt,gic-version=3,virtualization=on" -accel "tcg,thread=multi" -cpu "$cpu" -smp 2 -m "$LAB_MEMORY"
        -kernel "$lab/host/vmlinuz" -initrd "$job/initrd"
        -append "console=ttyAMA0 loglevel=4 panic=-1 oops=panic audit=0 apparmor=0 cryptomgr.notests"
        -chardev "file,id=console,path=$out/console.log" -serial chardev:console
        -virtfs "local,path=$share,mount_tag=checkout,readonly=on,security_model=none,multidevs=remap"
        # ioeventfd=off: QEMU has taken what is written before the writer goes on, so all of it is in the file when the
        # status comes.
        -device "virtio-serial-pci,ioeventfd=off"
        -chardev "file,id=output,path=$out/output.log" -device "virtserialport,chardev=output,name=lab.output"
    )
    say "starting (log: ${lab#"$PWD"/}/console.log)"
    begun=$SECONDS ready=''
    nice setpriv --pdeathsig KILL qemu-system-aarch64 "${args[@]}" </dev/null >"$lab/qemu.log" 2>&1 8>&- &
    emulator=$!
    tail -c +1 -s 0.1 -f --pid=$emulator "$lab/output.log" 8>&- &
    tail=$!
}
# A line of the console's, which has what the kernel and the lab itself say, and nothing of the command.
console() { tr -d '\r' <"$lab/console.log" | sed -n "s/^$1\$/\\1/p" | head -n 1; }

# A command is started over once.
for attempt in 1 2; do
    start
    while :; do
        over=; kill -0 "$emulator" 2>/dev/null || over=1
        if [ -z "$ready" ] && [ -n "$(console 'lab: \(ready\)')" ]; then
            ready=1
            say "ready after $((SECONDS - begun)) s"
        fi
        status=$(console 'lab: status \([0-9]*\)')
        if [ -n "$status" ]; then
            stop
            [ "$status" != 77 ] || status=1 # it is not for the command to say that there is no emulator
            exit "$status"
        fi
        if [ "$SECONDS" -ge "$limit" ]; then
            stop
            say "error: ended after $limit s (LAB_TIMEOUT); console: $lab/console.log"
            exit 124
        fi
        why=$(console '\[ *[0-9.]*\] \(Kernel panic.*\)')
        [ -z "$why" ] || break
        why="QEMU ended without a status; see ${lab#"$PWD"/}/qemu.log"
        [ -z "$over" ] || break
        why="it was not ready after 200 s, where it takes a quarter of a minute"
        [ -n "$ready" ] || [ $((SECONDS - begun)) -lt 200 ] || break
        sleep 0.2
    done
    stop
    cp "$lab/console.log" "$lab/console.$attempt.log"
    why="$why; log: ${lab#"$PWD"/}/console.$attempt.log"
    [ "$attempt" = 2 ] || say "the lab's own kernel died ($why); starting the lab over"
done
fail "the lab's own kernel died 2 times ($why)"
