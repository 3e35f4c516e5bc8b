#!/usr/bin/env bash
# Runs VMs by mce-relay@.service under a systemd of its own, which is process 1 of new namespaces on the Debian root DIR, where
# /root/mce-relay.deb is the package: whether a VM has all it needs within the unit's limits, and nothing else. The guest is two
# instructions, so any KVM will do. As root: `tests/service-live.sh DIR`.
set -euo pipefail
umask 022

die() { printf 'tests/service-live.sh: error: %s\n' "$*" >&2; exit 1; }

# In the namespaces: makes what systemd expects of a container's manager, and becomes systemd.
if [ "$1" = --inside ]; then
    root=$2
    mount --make-rprivate /
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    for dir in run tmp dev; do mount -t tmpfs tmpfs "$root/$dir"; done
    cp -a /dev/{null,zero,full,random,urandom,tty,kvm} "$root/dev/"
    mkdir "$root"/dev/{net,pts,shm}
    [ ! -e /dev/net/tun ] || cp -a /dev/net/tun "$root/dev/net/"
    mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
    ln -s pts/ptmx "$root/dev/ptmx"
    # As udev has them.
    chroot "$root" chgrp kvm /dev/kvm
    chmod 660 "$root/dev/kvm"
    [ ! -e "$root/dev/net/tun" ] || chmod 666 "$root/dev/net/tun"
    if [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ]; then
        mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    else
        mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
        mkdir "$root"/sys/fs/cgroup/{systemd,devices,unified}
        mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd"
        mount -t cgroup -o devices cgroup "$root/sys/fs/cgroup/devices"
        mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup/unified"
    fi
    # Not a chroot: in one no process may make a user namespace, which PrivateUsers= does.
    cd "$root"
    mkdir -p .host
    pivot_root . .host
    exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        sh -c 'umount -l /.host && rmdir /.host && exec /lib/systemd/systemd --log-target=console --show-status=no'
fi

root=$(realpath "$1")
if [ ! -w /dev/kvm ]; then
    echo 'SKIPPED a VM of the unit: there is no /dev/kvm here, or it may not be written to' >&2
    exit 0
fi
# Nothing of the root's own that would touch this machine.
for unit in systemd-{udevd,networkd,resolved,timesyncd,modules-load,sysctl,random-seed} rasdaemon ras-mc-ctl ssh; do
    ln -sfn /dev/null "$root/etc/systemd/system/$unit.service"
done

# A cgroup of its own in each hierarchy, so that what systemd makes there can be removed.
mapfile -t groups < <(awk '$3 ~ /^cgroup2?$/ { print $2 }' /proc/mounts)
group=mce-relay-test-$$
log=$(mktemp)
pid=
end() {
    if [ -n "$pid" ]; then
        kill -KILL "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    fi
    rm -f "$log"
    # Processes leave their cgroups a moment after they were killed.
    for _ in {1..50}; do
        find "${groups[@]/%//$group}" -depth -type d -exec rmdir {} + 2>/dev/null || true
        [ -n "$(find "${groups[@]/%//$group}" -maxdepth 0 2>/dev/null)" ] || break
        sleep 0.1
    done
}
trap end EXIT
(
    for dir in "${groups[@]}"; do
        mkdir "$dir/$group" || continue
        echo "$BASHPID" >"$dir/$group/cgroup.procs" || true # cpuset takes none without settings
    done 2>/dev/null
    exec unshare --kill-child=KILL -m -p -f -C -u -n -i "$0" --inside "$root"
) </dev/null >"$log" 2>&1 &
pid=$!
systemd=
for _ in {1..150}; do
    systemd=$(pgrep -P "$pid" -x systemd) && [ -S "/proc/$systemd/root/run/systemd/private" ] && break
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.2
done
inside() { nsenter -t "$systemd" -m -p -u -n -i -C -r -w env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 "$@"; }
state=
[ -z "$systemd" ] || state=$(inside timeout 60 systemctl is-system-running --wait) || true
case $state in
running | degraded) ;; # what does not run of Debian's own is not our matter
*)
    echo "SKIPPED a VM of the unit: systemd does not start in a container here: $(tail -5 "$log")" >&2
    exit 0
    ;;
esac

# hlt; jmp -3: asleep until its VM ends. With its ELF headers, and the note by which it is entered in 32-bit mode.
python3 - "$root/root/kernel" <<'END'
import struct, sys
code, entry = b"\xf4\xeb\xfd", 0x100000
note = struct.pack("<3I4sI", 4, 4, 18, b"Xen", entry)
header = struct.pack("<16s2HI3QI6H", b"\x7fELF\2\1\1", 2, 62, 1, entry, 64, 0, 0, 64, 56, 2, 0, 0, 0)
segments = ((4, 0, note, 176), (1, entry, code, 176 + len(note)))
parts = [struct.pack("<2I6Q", kind, 5, at, where, where, len(of), len(of), 4) for kind, where, of, at in segments]
open(sys.argv[1], "wb").write(b"".join([header, *parts, note, code]))
END
inside dpkg -i /root/mce-relay.deb >"$log" 2>&1 || die "dpkg -i fails under systemd: $(cat "$log")"
[ -z "$(inside systemctl list-units --all --no-legend 'mce-relay@*')" ] || die 'installing made an instance'

# A VM with every kind of device that can be had here, on files where the unit has places for them.
socket=/run/mce-relay-vm1/mce-relay/vm1.sock
# shellcheck disable=SC2016 # the inner shell's
inside sh -ec 'mkdir -p /srv/vm1 /data
    install -m 644 /root/kernel /srv/vm1/kernel
    for disk in /srv/vm1/disk /data/disk; do truncate -s 1M $disk; chown mce-relay: $disk; done'
tap=
if inside ip tuntap add dev vm1 mode tap user mce-relay 2>/dev/null && inside ip link set vm1 up; then
    tap='--net tap=vm1'
else
    echo 'SKIPPED a tap in the VM of the unit: this machine gives none (/dev/net/tun, ip)' >&2
fi
cat >"$root/etc/mce-relay/vm1.conf" <<END
OPTIONS="
    --kernel /srv/vm1/kernel --cmdline 'console=hvc0 panic=10' --cpus 2 $tap
    --memory size=64M,prefault=on --rng src=/dev/urandom --disk path=/srv/vm1/disk
    --vsock cid=3,socket=/run/mce-relay-vm1/vsock
    --serial off --console file=/var/log/mce-relay/vm1/console
    --event-monitor path=/var/log/mce-relay/vm1/events
"
END
journal() { inside journalctl --no-pager -q -o cat -u "mce-relay@$1"; }
active() { # NAME WORD
    local is
    is=$(inside systemctl is-active "mce-relay@$1") || true
    [ "$is" = "$2" ] || die "mce-relay@$1 is $is, expected $2: $(journal "$1")"
}
vm() { inside mce-relay "$@" >"$log" 2>&1 || die "mce-relay $* fails: $(cat "$log")"; }

inside systemctl enable --now -q mce-relay@vm1 || die "mce-relay@vm1 does not start: $(journal vm1)"
for _ in {1..50}; do
    inside mce-relay status --vm $socket >/dev/null 2>&1 && break
    sleep 0.2
done
active vm1 active
vm list --all
grep -q 'vm1 *mce-relay .*running' "$log" || die "list --all shows: $(cat "$log")"
main=$(inside systemctl show -P MainPID mce-relay@vm1)
inside cat "/proc/$main/status" >"$log"
for line in $'CapBnd:\t0000000000000000' $'CapEff:\t0000000000000000' $'NoNewPrivs:\t1' $'Seccomp:\t2'; do
    grep -q "^$line$" "$log" || die "the VM's process has not $line: $(cat "$log")"
done
[ "$(inside cat "/proc/$main/cmdline" | tr '\0' '\n' | grep -c '^console=hvc0 panic=10$')" = 1 ] ||
    die "the quotes of OPTIONS are not kept: $(inside cat "/proc/$main/cmdline" | tr '\0' '|')"
# What the relay and the API need: early kill, guest memory, userfaultfd, building the VM again, files opened anew.
vm status --vm $socket
grep -q 'early kill' "$log" || die "status says: $(cat "$log")"
vm poison --vm $socket --random 1 --seed 1 --via signal
vm poison --vm $socket --random 1 --seed 2 --via uffd
vm memory dump --vm $socket /tmp/core
vm reset --vm $socket
inside mv /var/log/mce-relay/vm1/events /var/log/mce-relay/vm1/events.1
inside systemctl reload mce-relay@vm1
vm pause --vm $socket
vm resume --vm $socket
inside grep -q '"paused"' /var/log/mce-relay/vm1/events || die 'a reload does not open the file of events anew'
# This guest has no power button, so its power is cut, and that is no failure. What became of it can be read.
inside systemctl stop mce-relay@vm1
active vm1 inactive
vm_ended=$(inside env XDG_RUNTIME_DIR=/run/mce-relay-vm1 mce-relay status --vm vm1)
[[ $vm_ended = *'exit status 143'* ]] || die "the record of vm1 says: $vm_ended"

# Nothing elsewhere, until the unit is told so.
cat >"$root/etc/mce-relay/vm2.conf" <<END
OPTIONS="--kernel /srv/vm1/kernel --memory size=64M --serial off --disk path=/data/disk"
END
inside systemctl start mce-relay@vm2 || true
for _ in {1..50}; do
    grep -q 'Read-only file system' <<<"$(journal vm2)" && break
    sleep 0.2
done
grep -q 'cannot open the disk /data/disk.*Read-only file system' <<<"$(journal vm2)" || die "vm2 says: $(journal vm2)"
inside systemctl stop mce-relay@vm2
inside sh -ec 'mkdir /run/systemd/system/mce-relay@vm2.service.d
    printf "[Service]\nReadWritePaths=/data\n" >/run/systemd/system/mce-relay@vm2.service.d/disk.conf
    systemctl daemon-reload
    systemctl reset-failed mce-relay@vm2 2>/dev/null || true
    systemctl start mce-relay@vm2'
for _ in {1..50}; do
    inside mce-relay status --vm /run/mce-relay-vm2/mce-relay/vm2.sock >/dev/null 2>&1 && break
    sleep 0.2
done
active vm2 active

# Removing the package stops it.
inside dpkg -r mce-relay >"$log" 2>&1 || die "dpkg -r fails under systemd: $(cat "$log")"
[ "$(inside pgrep -c -x mce-relay)" = 0 ] || die 'dpkg -r leaves a VM running'
inside dpkg -P mce-relay >"$log" 2>&1 || die "dpkg -P fails under systemd: $(cat "$log")"
[ -z "$(inside find /etc/systemd/system /var/log/mce-relay -name '*mce-relay*' 2>/dev/null)" ] ||
    die 'dpkg -P leaves an enabled instance, or logs'
echo "the unit runs VMs under systemd $(inside systemctl --version | awk '{ print $2; exit }'), within its limits"
