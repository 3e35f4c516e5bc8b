#!/usr/bin/env bash
# Runs a command in the lab: an emulated AMD machine with a stock Debian kernel, so with KVM and
# with memory failure, whose file system is this machine's own, read-only.
#
# usage: run.sh [COMMAND [ARGUMENT...]]       without a command: a shell on this terminal
#
# LAB_QEMU      the emulator: a path, or a name on PATH (qemu-system-x86_64)
# LAB_NPT       whether KVM in the lab uses nested paging, 0 or 1 (what suits the emulator, see below)
# LAB_MEMORY    memory of the lab (5G)
# LAB_TIMEOUT   seconds after which a run is ended (1500; a shell has no limit unless this is set)
# MCE_RELAY_*, RUST_LOG and RUST_BACKTRACE reach the command. It also finds
#   MCE_RELAY_LAB=1
#   MCE_RELAY_LAB_OUT       a directory for results, target/lab/out inside and outside
#   MCE_RELAY_LAB_EMULATOR  which QEMU this is, for people
#   MCE_RELAY_LAB_MONITOR   a device that takes commands of QEMU's monitor, mce above all
#
# What the command prints, on either stream, comes out here on standard output; it reads nothing.
#
# Exit status: that of the command (128+N for signal N); 124 time limit; 125 the lab failed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd)
lab=$top/target/lab
interactive=
[ $# != 0 ] || interactive=1
limit=${LAB_TIMEOUT:-${interactive:+100000000}}
limit=${limit:-1500}

say() { printf 'lab: %s\n' "$*" >&2; }
fail() { say "error: $*"; exit 125; }

[[ $limit =~ ^[1-9][0-9]*$ ]] || fail "LAB_TIMEOUT=$limit is not a number of seconds above 0"
[[ ${LAB_MEMORY:=5G} =~ ^[1-9][0-9]*[MG]$ ]] || fail "LAB_MEMORY=$LAB_MEMORY is not a size such as 5G or 5120M"
[ -z "$interactive" ] || { [ -t 0 ] && [ -t 1 ]; } ||
    fail "a shell in the lab needs a terminal; give a command to run instead"
[[ ${LAB_NPT:=} =~ ^[01]?$ ]] || fail "LAB_NPT=$LAB_NPT is neither 0 nor 1"
"$here/build.sh" || fail "the lab could not be built (see above)"
emulator=${LAB_QEMU:-qemu-system-x86_64}
command -v "$emulator" >/dev/null || fail "LAB_QEMU=$emulator is no command that can be run"
version=$("$emulator" --version 2>&1 | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p')
[ -n "$version" ] || fail "$emulator --version does not say which QEMU it is; LAB_QEMU names another"
# Before 9 with nested paging the emulator goes on right behind the host's VMRUN with the guest's page tables in
# force, now and then or (8.2) always, and takes guest or host with it. Since 10.0 without nested paging no guest
# gets further than its first halt, and with it all do. DESIGN.md has what was tried.
npt=1 untried=
case $version in
6.2 | 6.2.* | 7.2 | 7.2.* | 8.2 | 8.2.*) npt=0 ;;
10.[0-2] | 10.[0-2].* | 11.1 | 11.1.*) ;;
[0-8].*) npt=0 untried=1 ;;
*) untried=1 ;;
esac
npt=${LAB_NPT:-$npt}
if [ "$npt" = 1 ]; then paging=on; else paging=off; fi
export MCE_RELAY_LAB_EMULATOR="QEMU $version with nested paging $paging"
say "emulator: $MCE_RELAY_LAB_EMULATOR"
[ -z "$untried" ] ||
    say "warning: nobody has tried the lab with QEMU $version, only with 6.2, 7.2, 8.2, 10.0 to 10.2 and 11.1;" \
        "if no guest comes up in it, LAB_NPT=$((1 - npt)) tries the other kind of paging, and LAB_QEMU names another QEMU"
mkdir -p "$lab/out"
exec 8>"$lab/.lock"
flock -n 8 || { say "another run is under way in this checkout, waiting for it"; flock 8; }
SECONDS=0 # the limit is for the run, not for the waiting

# Sockets want a short path, which the checkout's may not be.
job=$(mktemp -d "${TMPDIR:-/tmp}/mce-relay-lab.XXXXXX")
qemu='' tail='' terminal=''
[ -z "$interactive" ] || terminal=$(stty -g)

stop() { # ends QEMU, politely first
    [ -n "$qemu" ] || return 0
    kill "$qemu" 2>/dev/null || true
    for _ in {1..20}; do kill -0 "$qemu" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$qemu" 2>/dev/null || true
    wait "$qemu" 2>/dev/null || true
    qemu=''
    [ -z "$tail" ] || wait "$tail" 2>/dev/null || true # it ends by itself, with the last output
    tail=''
}
# shellcheck disable=SC2317 # called by the trap
leave() {
    stop
    [ -z "$terminal" ] || stty "$terminal" || true # it may have been closed
    rm -rf "$job"
}
trap leave EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

quote() { # for any POSIX shell, unlike bash's own %q
    local word=${1//\'/\'\\\'\'}
    printf "'%s'" "$word"
}
printf 'top=%s\n' "$(quote "$top")" >"$job/paths"
{
    for name in $(compgen -e | grep -E '^(MCE_RELAY_[A-Za-z0-9_]*|RUST_LOG|RUST_BACKTRACE)$' |
        grep -vE '^MCE_RELAY_LAB(_OUT|_MONITOR)?$'); do
        printf 'export %s=%s\n' "$name" "$(quote "${!name}")"
    done
    printf 'export PATH=%s:/usr/sbin:/sbin\n' "$(quote "$PATH")"
    printf 'cd %s || exit 125\n' "$(quote "$top")"
    if [ -n "$interactive" ]; then
        : >"$job/interactive"
        printf 'export TERM=%s\nstty %s\n' "$(quote "${TERM:-vt100}")" "$(stty size | awk '{ print "rows", $1, "cols", $2 }')"
        printf 'if [ -x /bin/bash ]; then exec /bin/bash -i; else exec sh -i; fi\n'
    else
        printf 'exec'
        for word; do printf ' %s' "$(quote "$word")"; done
        printf '\n'
    fi
} >"$job/command"

start() { # one boot; QEMU runs in the background afterwards
    : >"$job/control"
    : >"$lab/output.log"
    rm -f "$job/monitor" "$lab/console.log"
    # tsc=reliable: the kernel patches its code when it takes the TSC for unstable, see tests/src/bin/hold.rs.
    # panic=-1 and -no-reboot: QEMU ends when the lab's kernel dies. oops=panic: a kernel that
    # an emulator fault has hit must not go on and let a test fail for it. So must one of which a processor waits for
    # the other one for a minute (an interrupt between them is lost): its log says then where both stand.
    # -smp 3 isolcpus=0: nothing but the kernel's own work runs on processor 0, so no guest does. The emulator lets every
    # processor change flags of the first one, its global interrupt flag among them, without a lock (DESIGN.md).
    # nohz=off highres=off: an interrupt that the emulator has lost (DESIGN.md) comes with the next tick, also on an idle
    # processor, and the tick itself goes on where one of its own was lost: the local APIC repeats it unasked.
    # ioeventfd=off: QEMU has taken a write to a port before the writer goes on, so all output
    # is in the file when the status comes.
    local share=security_model=none,multidevs=remap out=${lab//,/,,} job=${job//,/,,} # QEMU's quoting
    # shellcheck disable=SC2054 # the commas are QEMU's
    local args=(
        -nodefaults -no-user-config -display none -no-reboot
        -accel "tcg,thread=multi" -cpu "EPYC,+svm,+npt" -smp 3 -m "$LAB_MEMORY"
        -kernel "$lab/vmlinux" -initrd "$lab/initramfs.cpio"
        -append "console=ttyS0 quiet panic=-1 oops=panic softlockup_panic=1 softlockup_all_cpu_backtrace=1 watchdog_thresh=30 isolcpus=0 nohz=off highres=off mitigations=off tsc=reliable audit=0 apparmor=0 LAB_NPT=$npt"
        -chardev "file,id=console,path=$out/console.log" -serial chardev:console
        -virtfs "local,path=/,mount_tag=host,readonly=on,$share"
        -virtfs "local,path=$out/out,mount_tag=out,$share"
        -virtfs "local,path=$job,mount_tag=job,readonly=on,$share"
        -device virtio-serial-pci,ioeventfd=off
        -chardev "file,id=control,path=$job/control"
        -device virtserialport,chardev=control,name=lab.control
        -chardev "socket,id=monitor,path=$job/monitor,server=on,wait=off"
        -mon chardev=monitor,mode=readline
        -chardev "socket,id=commands,path=$job/monitor"
        -device virtserialport,chardev=commands,name=lab.monitor
    )
    if [ -n "$interactive" ]; then
        args+=(-chardev "stdio,id=tty,signal=off" -device "virtconsole,chardev=tty")
    else
        args+=(-chardev "file,id=output,path=$out/output.log" -device "virtserialport,chardev=output,name=lab.output")
    fi
    say "starting (log: ${lab#"$PWD"/}/console.log)"
    # pdeathsig: should this script be killed outright, no emulated machine stays behind.
    local run=(setpriv --pdeathsig KILL "$emulator" "${args[@]}")
    if [ -n "$interactive" ]; then
        "${run[@]}" <&0 2>"$lab/qemu.log" 8>&- &
        qemu=$!
    else
        "${run[@]}" </dev/null >"$lab/qemu.log" 2>&1 8>&- &
        qemu=$!
        # A file in between cannot lose anything, however slowly the caller reads.
        tail -c +1 -s 0.1 -f --pid=$qemu "$lab/output.log" 8>&- &
        tail=$!
    fi
}

# A command is started over once. A lab that dies before it is ready has run nothing yet.
lost=
for attempt in 1 2 3; do
    ready='' still='' beat='' quiet=0
    begun=$SECONDS
    start
    while :; do
        over=; kill -0 "$qemu" 2>/dev/null || over=1
        # Until then Ctrl-C is for this script; QEMU has the terminal so that it is for the lab.
        [ -z "$interactive" ] || [ -n "$ready" ] || stty isig
        if [ -z "$ready" ] && grep -q '^ready' "$job/control"; then
            ready=1
            [ -z "$interactive" ] || stty -isig
            say "ready after $((SECONDS - begun)) s"
        fi
        status=$(sed -n 's/^status \([0-9]*\)$/\1/p' "$job/control")
        if [ -n "$status" ]; then
            stop
            exit "$status"
        fi
        [ -z "$over" ] || break
        # Looks are counted and not seconds: where this machine itself stands still, its clock goes on and the lab does not.
        last=$beat
        beat=$(stat -c %Y "$job/control")
        if [ "$beat" = "$last" ]; then quiet=$((quiet + 1)); else quiet=0; fi
        if [ -n "$ready" ] && [ "$quiet" -gt 1200 ]; then
            still="it stood still for two minutes"
            stop
            break
        fi
        # Nobody listens any more, as after `| head`.
        [ -z "$tail" ] || kill -0 "$tail" 2>/dev/null || ! kill -0 "$qemu" 2>/dev/null || exit 141
        if [ "$SECONDS" -ge "$limit" ]; then
            stop
            say "error: ended after $limit s (LAB_TIMEOUT); console: $lab/console.log"
            exit 124
        fi
        [ -n "$ready" ] || [ $((SECONDS - begun)) -lt 300 ] ||
            fail "not ready after 300 s, it should take about 10; console: $lab/console.log"
        sleep 0.1
    done
    code=0
    [ -z "$qemu" ] || wait "$qemu" || code=$?
    stop
    if [ -z "$ready" ] && [ "$code" = 1 ]; then # QEMU's way to refuse its arguments; no fault to retry
        cat "$lab/qemu.log" >&2
        fail "QEMU did not start the lab (see above)"
    fi
    why=$(grep -aom1 'Kernel panic.*' "$lab/console.log" | tr -d '\r') || why=${still:-QEMU ended without a status}
    cp "$lab/console.log" "$lab/console.$attempt.log"
    [ -z "$lost" ] || break
    lost=$ready
    [ "$attempt" = 3 ] || say "the lab's own kernel died ($why; log: target/lab/console.$attempt.log); starting the lab over"
done
fail "the lab's own kernel died $attempt times ($why; logs: target/lab/console.*.log); the command has no result"
