#!/usr/bin/env bash
# Makes the Debian guest's disk, as root or below fakeroot: the packages, the kernel's modules, what is below overlay/,
# the keys and the agent, as one file system.
#
# usage: disk.sh PACKAGES OUT MODULES AGENT TMP
#   PACKAGES  an archive of them, unpacked and configured
#   OUT       has ssh_key.pub and host_key
#   MODULES   the modules of one kernel, the folder with its version as name
#   AGENT     the agent's binary
#   TMP       a folder where disk.img is put, and what it is made of meanwhile
set -euo pipefail

[ $# = 5 ] || { echo 'usage: disk.sh PACKAGES OUT MODULES AGENT TMP' >&2; exit 2; }
packages=$1 out=$2 modules=$3 agent=$4 tmp=$5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$tmp/root
version=$(basename "$modules")

mkdir "$root"
zstd -dcq "$packages" | tar -x -C "$root" --numeric-owner --xattrs-include='*'
mkdir -p "$root/dev" # the nodes in it are the guest's kernel's

# Modules of hardware that a virtual machine may have, or of none; the others are two thirds.
drivers='acpi|block|char|cpufreq|crypto/(ccp|virtio)|cxl|dax|edac|md|misc|nvdimm|nvme|pci|ptp|ras|rtc|scsi|vhost|virtio|watchdog'
mkdir -p "$root/usr/lib/modules/$version"
(cd "$modules" && find . -type f -print0) |
    grep -zvE '^./kernel/(sound|net/(bluetooth|mac80211|nfc|rfkill|wireless))/' |
    grep -zE "^./[^/]*$|^./kernel/(drivers/(($drivers)/|(input|net)/[^/]*$)|[^d]|d[^r])" |
    tar -c -C "$modules" --null -T - --owner=0 --group=0 | tar -x -C "$root/usr/lib/modules/$version"
depmod -b "$root" "$version"

tar -c -C "$here/overlay" --owner=0 --group=0 --mode='u=rwX,go=rX' . | tar -x -C "$root" --keep-directory-symlink
install -D -m 755 "$agent" "$root/usr/sbin/mce-relay-agent"
install -d -m 700 "$root/root/.ssh"
install -m 600 "$out/ssh_key.pub" "$root/root/.ssh/authorized_keys"
install -m 600 "$out/host_key" "$root/etc/ssh/ssh_host_ed25519_key"
install -m 644 "$out/host_key.pub" "$root/etc/ssh/ssh_host_ed25519_key.pub"
: >"$root/etc/machine-id" # made at the first boot, which is not one that asks questions

# As systemctl would, which not every machine has.
units=$root/etc/systemd/system
for unit in systemd-networkd mce-relay-agent; do
    mkdir -p "$units/multi-user.target.wants"
    file=/etc/systemd/system/$unit.service
    [ -e "$root$file" ] || file=/lib/systemd/system/$unit.service
    ln -sf "$file" "$units/multi-user.target.wants/$unit.service"
done
# What only takes time here, or needs what a virtual machine does not have (ras-mc-ctl: memory modules with labels).
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer getty-static.service getty@tty1.service ras-mc-ctl.service systemd-firstboot.service \
    systemd-networkd-wait-online.service systemd-pstore.service systemd-repart.service \
    sys-fs-fuse-connections.mount sys-kernel-config.mount systemd-binfmt.service proc-sys-fs-binfmt_misc.automount; do
    ln -sf /dev/null "$units/$unit"
done

find "$root" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
# A file system that is made of a folder needs no mount. Of a gigabyte some half is free.
truncate -s 1G "$tmp/disk.img"
uuid=6d63652d-7265-6c61-792d-64656269616e # any fixed one
E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH mke2fs -q -F -t ext4 -L debian -U "$uuid" -m 0 -J size=16 \
    -E "hash_seed=$uuid,lazy_itable_init=0,root_owner=0:0" -d "$root" "$tmp/disk.img"
rm -rf "$root"
