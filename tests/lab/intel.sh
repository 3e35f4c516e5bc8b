#!/usr/bin/env bash
# Runs a command in the lab's other host: an Intel machine with KVM, emulated by Bochs, from Debian's packages.
#
# usage: intel.sh COMMAND [ARGUMENT...]
#
# LAB_TIMEOUT  seconds after which a run is ended (1500)
# LAB_FILES    more files and directories that the command needs there, besides what it names itself
# MCE_RELAY_*, RUST_LOG and RUST_BACKTRACE reach the command. It also finds MCE_RELAY_LAB=1 and MCE_RELAY_LAB_EMULATOR.
#
# QEMU emulates no VMX. Bochs does, and no machine checks: hardware errors and mce-inject are the other lab's. There is
# one processor, and no file system of the real machine: what the command names below this checkout is packed with it,
# programs with their libraries, and nothing comes back but what it prints.
#
# Exit status: that of the command (128+N for signal N); 77 there is no Bochs here; 124 time limit; 125 the lab failed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd)
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
LAB_MODULES='kvm-intel hwpoison-inject tun' LAB_OUT=$lab/host "$here/build.sh" || fail "the lab could not be built (see above)"
mkdir -p "$lab"
exec 8>"$lab/.lock"
flock -n 8 || { say "another run is under way in this checkout, waiting for it"; flock 8; }
SECONDS=0

emulator=''
job=$(mktemp -d "${TMPDIR:-/tmp}/mce-relay-lab.XXXXXX")
stop() {
    [ -n "$emulator" ] || return 0
    kill -- "-$emulator" 2>/dev/null || true
    for _ in {1..20}; do kill -0 "$emulator" 2>/dev/null || break; sleep 0.1; done
    kill -9 -- "-$emulator" 2>/dev/null || true
    wait "$emulator" 2>/dev/null || true
    emulator=''
}
leave() {
    stop
    rm -rf "$job"
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
    while read -r file; do pack "$file"; done < <(find "$one" -type f)
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
install -m 755 "$here/intel-init" "$root/init"
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
  append initrd=/initrd console=ttyS0,115200 loglevel=4 panic=-1 oops=panic mitigations=off tsc=reliable audit=0 apparmor=0 cryptomgr.notests rcupdate.rcu_expedited=1
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
ata0-master: type=cdrom, path=$job/lab.iso, status=inserted
pci: enabled=1, chipset=i440fx
com1: enabled=1, mode=file, dev=$job/serial
log: $lab/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
END
echo c >"$job/go"
say "emulator: $MCE_RELAY_LAB_EMULATOR"

# Debian's Bochs is built with its debugger, which is told to go on, and shows a screen, which wants a terminal.
start() {
    : >"$job/serial"
    say "starting (log: ${lab#"$PWD"/}/console.log)"
    TERM=xterm setsid setpriv --pdeathsig KILL script -qfc "bochs -q -f '$job/bochsrc' -rc '$job/go'" /dev/null \
        </dev/null >"$lab/screen.log" 2>&1 8>&- &
    emulator=$!
    begun=$SECONDS ready='' shown=0
}
# What the command has printed, without the carriage returns of a serial line.
printed() { tr -d '\r' <"$job/serial" | sed -n '/^lab: ready$/,/^lab: status /{ /^lab: \(ready$\|status \)/!p }'; }
show() { # what is new of it, whole lines
    local lines
    lines=$(printed | wc -l)
    [ "$lines" -gt "$shown" ] || return 0
    printed | sed -n "$((shown + 1)),${lines}p"
    shown=$lines
}

# A command is started over once.
for attempt in 1 2; do
    start
    while :; do
        over=; kill -0 "$emulator" 2>/dev/null || over=1
        sleep 0.5
        cp "$job/serial" "$lab/console.log"
        if [ -z "$ready" ] && grep -qa '^lab: ready' "$job/serial"; then
            ready=1
            say "ready after $((SECONDS - begun)) s"
        fi
        show
        status=$(tr -d '\r' <"$job/serial" | sed -n 's/^lab: status \([0-9]*\)$/\1/p')
        [ -z "$status" ] || exit "$status"
        if [ "$SECONDS" -ge "$limit" ]; then
            say "error: ended after $limit s (LAB_TIMEOUT); console: $lab/console.log"
            exit 124
        fi
        if why=$(grep -aom1 '^\[ *[0-9.]*\] Kernel panic.*' "$job/serial" | tr -d '\r'); then break; fi
        why="Bochs ended without a status"
        [ -z "$over" ] || break
        why="it was not ready after 400 s, where it takes a minute"
        [ -n "$ready" ] || [ $((SECONDS - begun)) -lt 400 ] || break
    done
    stop
    cp "$lab/console.log" "$lab/console.$attempt.log"
    why="the lab's own kernel died ($why; log: ${lab#"$PWD"/}/console.$attempt.log)"
    [ "$attempt" = 2 ] || say "$why; starting the lab over"
done
fail "the lab's own kernel died 2 times: $why"
