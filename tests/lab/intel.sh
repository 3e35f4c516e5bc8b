#!/usr/bin/env bash
# Runs a command in the lab's other host: an Intel machine with KVM, emulated by Bochs, from Debian's packages.
#
# usage: intel.sh COMMAND [ARGUMENT...]
#        intel.sh --setup      only installs what this needs
#
# LAB_TIMEOUT  seconds after which a run is ended (1500)
# LAB_FILES    more files and directories that the command needs there, with blanks between (none in their names)
# MCE_RELAY_*, RUST_LOG and RUST_BACKTRACE reach the command. It also finds MCE_RELAY_LAB=1 and MCE_RELAY_LAB_EMULATOR.
#
# QEMU emulates no VMX. Bochs does, and no machine checks: hardware errors and mce-inject are the other lab's. There is
# one processor, and no file system of the real machine. What is packed: words of the command that are files of this
# checkout, what LAB_FILES names, mce-relay, the guest's image, and libraries of all of them. Nothing comes back but what
# the command prints.
#
# Exit status: that of the command (128+N for signal N); 77 there is no Bochs here; 124 time limit; 125 the lab failed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd -P)
lab=$top/target/lab/intel
limit=${LAB_TIMEOUT:-1500}
bios=/usr/share/bochs/BIOS-bochs-latest
video=/usr/share/vgabios/vgabios.bin
isolinux=/usr/lib/ISOLINUX/isolinux.bin
ldlinux=/usr/lib/syslinux/modules/bios/ldlinux.c32
terminal=/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so

say() { printf 'lab: %s\n' "$*" >&2; }
fail() { say "error: $*"; exit 125; }

[ $# != 0 ] || fail "usage: intel.sh COMMAND [ARGUMENT...]"
[[ $limit =~ ^[1-9][0-9]*$ ]] || fail "LAB_TIMEOUT=$limit is not a number of seconds above 0"
NEED="bochs $bios:bochsbios $video:vgabios $isolinux:isolinux $ldlinux:syslinux-common $terminal:bochs-term
    genisoimage script:bsdutils strip:binutils" "$here/setup.sh" || {
    say "error: Bochs and what it needs could not be installed (see above)"
    exit 77
}
for file in "$bios" "$video" "$isolinux" "$ldlinux" "$terminal"; do
    [ -e "$file" ] || { say "error: there is no $file, which Debian 12's packages have there"; exit 77; }
done
[ "$1" != --setup ] || exit 0
LAB_MODULES='kvm-intel hwpoison-inject tun' LAB_OUT=$lab/host "$here/build.sh" || fail "the lab could not be built (see above)"
mkdir -p "$lab"
exec 8>"$lab/.lock"
flock -n 8 || { say "another run is under way in this checkout, waiting for it"; flock 8; }
SECONDS=0

emulator='' packed=''
job=$lab/job
rm -rf "$job"
mkdir "$job"
stop() {
    [ -n "$emulator" ] || return 0
    kill -- "-$emulator" 2>/dev/null || true
    for _ in {1..20}; do kill -0 "$emulator" 2>/dev/null || break; sleep 0.1; done
    kill -9 -- "-$emulator" 2>/dev/null || true
    wait "$emulator" 2>/dev/null || true
    emulator=''
}
leave() {
    local status=$?
    stop
    rm -rf "$job"
    [ -n "$packed" ] || [ "$status" -ge 125 ] || status=125 # the status is not the command's
    exit "$status"
}
trap leave EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# One file of this machine to the same place there, a program without its debugging information and with its libraries.
root=$job/root
pack() {
    local file=$1 library
    [ ! -e "$root$file" ] || return 0
    mkdir -p "$root$(dirname "$file")"
    case $(head -c 4 "$file" | od -An -tx1 | tr -d ' ') in
    7f454c46)
        strip --strip-debug --remove-section=.BTF -o "$root$file" "$file" 2>/dev/null || cp "$file" "$root$file"
        for library in $(ldd "$file" 2>/dev/null | grep -oE '/[^ ]+' || true); do
            [ -e "$root$library" ] || { mkdir -p "$root$(dirname "$library")"; cp -L "$library" "$root$library"; }
        done
        ;;
    *) cp "$file" "$root$file" ;;
    esac
}
mkdir -p "$root$top/tests" "$root$top/target" # paths lead by way of both
words=()
for word; do
    path=$(realpath -s "$word" 2>/dev/null) || path=
    if [ -n "$path" ] && [ -f "$path" ] && [[ $path == "$top"/* ]]; then
        pack "$path"
        [ "$PWD" = "$top" ] || word=$path
    fi
    words+=("$word")
done
for one in "$top/target/release/mce-relay" "$top"/target/guest-image/{vmlinux,initramfs.cpio,version} ${LAB_FILES:-}; do
    one=$(realpath -s "$one")
    [ -e "$one" ] || fail "$one is not there; make build guest-image"
    while IFS= read -r file; do pack "$file"; done < <(find -L "$one" -type f)
done

quote() {
    local word=${1//\'/\'\\\'\'}
    printf "'%s'" "$word"
}
export MCE_RELAY_LAB_EMULATOR="Bochs $(dpkg-query -Wf '${Version}' bochs 2>/dev/null || echo '(unknown)'), Intel with VMX"
{
    for name in $(compgen -e | grep -E '^(MCE_RELAY_[A-Za-z0-9_]*|RUST_LOG|RUST_BACKTRACE)$' | grep -vE '^MCE_RELAY_LAB(_OUT|_MONITOR)?$'); do
        printf 'export %s=%s\n' "$name" "$(quote "${!name}")"
    done
    printf 'cd %s || exit 125\nexec' "$(quote "$top")"
    for word in "${words[@]}"; do printf ' %s' "$(quote "$word")"; done
    printf '\n'
} >"$root/command"
install -m 755 "$here/bare-init" "$root/init"
mkdir -p "$job/iso/isolinux"
# The archives are read one behind the other: what the kernel's package gives, and what this run needs.
(cd "$root" && find . | cpio --quiet -o -H newc -R 0:0) >"$job/run.cpio"
cat "$lab/host/initramfs.cpio" "$job/run.cpio" >"$job/iso/initrd"
cp "$lab/host/vmlinuz" "$job/iso/vmlinuz"
cp "$isolinux" "$ldlinux" "$job/iso/isolinux/"
cat >"$job/iso/isolinux/isolinux.cfg" <<END
default lab
label lab
  kernel /vmlinuz
  append initrd=/initrd console=ttyS1,115200 loglevel=4 panic=-1 oops=panic mitigations=off tsc=reliable audit=0 apparmor=0 cryptomgr.notests rcupdate.rcu_expedited=1
END
genisoimage -quiet -R -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table \
    -o "$job/lab.iso" "$job/iso" || fail "genisoimage failed"
rm -r "$job/iso" "$job/run.cpio"
cat >"$job/bochsrc" <<END
config_interface: textconfig
display_library: term
memory: guest=2048, host=2048
romimage: file=$bios
vgaromimage: file=$video
cpu: model=corei7_haswell_4770, count=1, ips=150000000, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=none, time0=local
boot: cdrom
ata0-master: type=cdrom, path=lab.iso, status=inserted
pci: enabled=1, chipset=i440fx
com1: enabled=1, mode=file, dev=output
com2: enabled=1, mode=file, dev=console
log: bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
END
echo c >"$job/go"
packed=1
say "emulator: $MCE_RELAY_LAB_EMULATOR"

# Debian's Bochs is built with its debugger, which is told to go on, and shows a screen, which wants a terminal. Names are
# relative: what is special in a path is so to Bochs, too.
start() {
    : >"$job/output"
    : >"$job/console"
    say "starting (log: ${lab#"$PWD"/}/console.log)"
    (cd "$job" && TERM=xterm SHELL=/bin/sh exec setsid setpriv --pdeathsig KILL \
        script -qfc 'exec setpriv --pdeathsig KILL bochs -q -f bochsrc -rc go' /dev/null) \
        </dev/null >"$lab/screen.log" 2>&1 8>&- &
    emulator=$!
    begun=$SECONDS ready='' shown=0
}
show() { # what the command has printed since, whole lines
    local lines
    lines=$(wc -l <"$job/output")
    [ "$lines" -gt "$shown" ] || return 0
    sed -n "$((shown + 1)),${lines}p" "$job/output"
    shown=$lines
}
# A line of the console's, which has what the kernel and the lab itself say, and nothing of the command.
console() { tr -d '\r' <"$job/console" | sed -n "s/^$1\$/\\1/p" | head -n 1; }

# A command is started over once.
for attempt in 1 2; do
    start
    while :; do
        over=; kill -0 "$emulator" 2>/dev/null || over=1
        sleep 0.5
        if [ -z "$ready" ] && [ -n "$(console 'lab: \(ready\)')" ]; then
            ready=1
            say "ready after $((SECONDS - begun)) s"
        fi
        # Before what was printed is shown: all of it is there by then.
        status=$(console 'lab: status \([0-9]*\)')
        cp "$job/console" "$lab/console.log"
        show
        if [ -n "$status" ]; then
            tail -n +$((shown + 1)) "$job/output"
            [ "$status" != 77 ] || status=1 # it is not for the command to say that there is no Bochs
            exit "$status"
        fi
        if [ "$SECONDS" -ge "$limit" ]; then
            say "error: ended after $limit s (LAB_TIMEOUT); console: $lab/console.log"
            exit 124
        fi
        why=$(console '\[ *[0-9.]*\] \(Kernel panic.*\)')
        [ -z "$why" ] || break
        why="Bochs ended without a status; see ${lab#"$PWD"/}/bochs.log and screen.log"
        [ -z "$over" ] || break
        why="it was not ready after 200 s, where it takes a minute"
        [ -n "$ready" ] || [ $((SECONDS - begun)) -lt 200 ] || break
    done
    stop
    cp "$job/bochs.log" "$lab/bochs.log" || true
    cp "$lab/console.log" "$lab/console.$attempt.log"
    why="the lab's own kernel died ($why; log: ${lab#"$PWD"/}/console.$attempt.log)"
    [ "$attempt" = 2 ] || say "$why; starting the lab over"
done
fail "the lab's own kernel died 2 times: $why"
