#!/usr/bin/env bash
# Builds a guest as people run one, Debian with systemd, rasdaemon, sshd, stress-ng and fio, and the agent:
# target/guest-image/debian/
#   disk.img               an ext4 file system without a partition table, sparse
#   initramfs.cpio         mounts it and hands over to it
#   vmlinuz vmlinux version   the kernel, whose modules are in both
#   ssh_key known_hosts    for ssh -i ssh_key -o UserKnownHostsFile=known_hosts root@192.168.77.2
#
# KERNEL=            as for build.sh
# GUEST_IMAGE_DIR=   where build.sh puts its guest; this one goes into debian/ below it
#
# The packages come from where this machine's own do: no mirror and no version is written down here. They are
# fetched once, into target/debian-packages; remove that for those of today. Nothing is mounted, and root is needed only to install
# what this needs. Cheap when nothing has changed. Same input, same files and same initramfs; the keys stay as they are
# once they are made.
set -euo pipefail

me=guest-image/debian.sh
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(dirname "$here")
small=${GUEST_IMAGE_DIR:-$top/target/guest-image}
out=$small/debian
packages=$top/target/debian-packages
agent=$top/target/agent/x86_64-unknown-linux-gnu/release/agent # build.sh puts it there

say() { printf '%s: %s\n' "$me" "$*" >&2; }
die() { say "error: $*"; exit 1; }

PATH=$PATH:/usr/sbin:/sbin # mke2fs, off an ordinary user's path
needs='mmdebstrap mke2fs:e2fsprogs ssh-keygen:openssh-client'
[ "$(id -u)" = 0 ] || needs="$needs fakeroot newuidmap:uidmap"
NEED=$needs "$top/tests/lab/setup.sh"
"$here/build.sh"
kernel=$("$here/kernel.sh" "${KERNEL:-default}")
modules=$(find "$kernel/root" -maxdepth 4 -type d -path "*/lib/modules/$(cat "$kernel/version")" -print -quit)
[ -n "$modules" ] || die "$kernel has no modules, which this guest needs; KERNEL must name a kernel package"

# Sources of this machine's release, with its updates and without what it has from elsewhere.
release=$(. /etc/os-release 2>/dev/null && printf '%s' "${VERSION_CODENAME:-}") || true
# shellcheck disable=SC2016 # apt's own variables
sources=$(apt-get indextargets --format '$(ORIGIN) $(CODENAME) deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    awk -v release="$release" '$1 == "Debian" && $2 ~ "^" release "(-updates|-security)?$" && $6 == "main" {
        sub(/^[^ ]* [^ ]* /, ""); if (!seen[$0]++) print }') || true
[ -n "$sources" ] || die "this machine's package sources name no mirror of a Debian release, or apt has no package" \
    "lists yet (apt-get update)"
# How this machine reaches them.
mapfile -t reach < <(apt-config dump --format '%F "%v";%n' 2>/dev/null |
    grep -E '^Acquire::(Check-|Retries|https?::Proxy|ForceIPv)' | grep -v '::Proxy ""' | sed 's/^/--aptopt=/') || true
mapfile -t wanted < <(sed 's/ *#.*//; /^$/d' "$here/debian/packages")

mkdir -p "$out" "$packages"
exec 8>"$packages/.lock" 9>"$out/.lock"
flock 8
flock 9
tmp=$(mktemp -d "$out/.new.XXXXXX")
chmod 755 "$tmp" # a user namespace writes here, too
trap 'rm -rf "$tmp"' EXIT
export SOURCE_DATE_EPOCH=1 LC_ALL=C

# What the packages are, without anything of this project: the long part.
packages_stamp=$({ echo "$sources" "${wanted[@]}"; cat "$here/debian/hook.sh"; } | sha256sum)
if [ "$(cat "$packages/.stamp" 2>/dev/null)" != "$packages_stamp" ]; then
    say "fetching and unpacking $release's ${wanted[*]}"
    rm -f "$packages/.stamp"
    mode=unshare
    [ "$(id -u)" != 0 ] || mode=root
    include=$(IFS=,; echo "${wanted[*]}")
    unpack() { # how much it says
        mmdebstrap "$1" --mode="$mode" --variant=apt --include="$include" "${reach[@]}" \
            --aptopt='Apt::Install-Recommends "false"' \
            --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
            --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
            --dpkgopt='path-include=/usr/share/doc/*/copyright' --skip=output/dev \
            --customize-hook="$here/debian/hook.sh" --format=tar \
            "$release" - - <<<"$sources" >"$tmp/packages.tar"
    }
    unpack --quiet || {
        say "once more, with all that apt says of it"
        unpack --verbose
    } || die "Debian's packages cannot be had or unpacked (see above)"
    zstd -q -3 -T0 --rm "$tmp/packages.tar"
    mv "$tmp/packages.tar.zst" "$packages/"
    printf '%s\n' "$packages_stamp" >"$packages/.stamp"
fi

stamp=$({ echo "$kernel $packages_stamp"; cat "$packages/packages.tar.zst" "$agent" "$here/debian.sh" "$here/modules.sh" \
    "$(command -v busybox)"; find "$here/debian" -type f -print0 | sort -z | xargs -0 sha256sum; } | sha256sum)
if [ "$(cat "$out/.stamp" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
rm -f "$out/.stamp"

# A key to come in with, and the guest's own, so that nobody is asked whether it is the right one.
for key in ssh_key host_key; do
    [ -e "$out/$key" ] || { rm -f "$out/$key.pub"; ssh-keygen -q -t ed25519 -N '' -C "mce-relay $key" -f "$out/$key"; }
done
printf '192.168.77.2 %s\n' "$(cut -d ' ' -f 1,2 "$out/host_key.pub")" >"$out/known_hosts"

fake=
[ "$(id -u)" = 0 ] || fake=fakeroot
$fake "$here/debian/disk.sh" "$packages/packages.tar.zst" "$out" "$modules" "$agent" "$tmp"

# The initramfs: what it takes to mount the disk, on virtio-mmio as on PCI. The rest is loaded by udev.
root=$tmp/initramfs
mkdir -p "$root"/{bin,proc,sys,dev,newroot,modules}
install -m 755 "$here/debian/init" "$root/init"
install -m 755 "$(command -v busybox)" "$root/bin/busybox"
"$here/modules.sh" "$kernel" "$root/modules" virtio_mmio virtio_pci virtio_blk virtio_console ext4
find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
(cd "$root" && find . | sort | cpio --quiet -o -H newc -R 0:0 --reproducible) >"$tmp/initramfs.cpio"

for file in vmlinuz vmlinux version; do
    cp -l "$kernel/$file" "$tmp/" 2>/dev/null || cp "$kernel/$file" "$tmp/"
    mv -f "$tmp/$file" "$out/" 2>/dev/null || true # -f: two names of one file
done
mv "$tmp/disk.img" "$tmp/initramfs.cpio" "$out/"
printf '%s\n' "$stamp" >"$out/.stamp"
say "${out#"$top"/} is ready: Linux $(cat "$out/version"), a disk of $(($(stat -c %s "$out/disk.img") >> 20)) MiB," \
    "$(($(stat -c %b "$out/disk.img") >> 11)) MiB of it used"
