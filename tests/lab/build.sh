#!/usr/bin/env bash
# Builds the emulated host of the lab: target/lab/{vmlinuz,vmlinux,initramfs.cpio,version}.
#
# LAB_KERNEL=   its kernel package (unset: the newest full-flavour image that is offered; it has
#               to be a package, as the lab needs the modules that go with the kernel)
# LAB_MODULES=  its modules, as intel.sh and aarch64.sh have theirs
# LAB_OUT=      a directory in place of target/lab
# LAB_ARCH=     arm64: the kernel and busybox are that architecture's, of Debian's packages; there is no vmlinux
#
# Cheap when nothing has changed, so that every lab run can begin with it.
set -euo pipefail

me=tests/lab/build.sh
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd)
out=${LAB_OUT:-$top/target/lab}
PATH=$PATH:/usr/sbin:/sbin # depmod and modprobe, off an ordinary user's path

# What the lab's root file system, its channels and the tests need; modprobe adds what these need.
read -ra wanted <<<"${LAB_MODULES:-virtio_pci virtio_console 9pnet_virtio 9p kvm-amd hwpoison-inject mce-inject tun vhost_net}"

say() { printf '%s: %s\n' "$me" "$*" >&2; }
die() { say "error: $*"; exit 1; }

"$here/setup.sh"
kernel=$(KERNEL_ARCH=${LAB_ARCH:-amd64} "$top/guest-image/kernel.sh" "${LAB_KERNEL:-newest}")
version=$(cat "$kernel/version")
busybox=$(command -v busybox)
if [ "${LAB_ARCH:-amd64}" != amd64 ]; then
    store=$top/target/kernels/busybox-$LAB_ARCH
    if [ ! -x "$store/busybox" ]; then
        APT_CONFIG=$("$top/guest-image/foreign.sh" "$LAB_ARCH")
        fetched=$(mktemp -d)
        trap 'rm -rf "$fetched"' EXIT
        (cd "$fetched" && APT_CONFIG=$APT_CONFIG apt-get download -qq busybox-static >&2) ||
            die "cannot download busybox-static for $LAB_ARCH; are this machine's package sources reachable?"
        dpkg-deb -x "$fetched"/*.deb "$fetched/root"
        # In /bin, or in newer packages in /usr/bin.
        found=$(find "$fetched/root" -path '*/bin/busybox' -type f -print -quit)
        [ -n "$found" ] || die "busybox-static for $LAB_ARCH has no busybox"
        mkdir -p "$store"
        mv "$found" "$store/busybox.new.$$" && mv "$store/busybox.new.$$" "$store/busybox"
        rm -r "$fetched"
        trap - EXIT
    fi
    busybox=$store/busybox
fi

# The stamp goes first and comes back last: an interrupted run is then seen as out of date.
stamp=$({ echo "$kernel ${wanted[*]}"; cat "$here/build.sh" "$here/init" "$here/main" "$busybox"; } | sha256sum)
if [ "$(cat "$out/.stamp" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
mkdir -p "$out"
rm -f "$out/.stamp"
tmp=$(mktemp -d "$out/.new.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

# A base directory whose lib/modules is the package's, wherever that has it (/usr/lib in newer ones).
modules=$(find "$kernel/root" -maxdepth 4 -type d -path "*/lib/modules/$version" -print -quit)
[ -n "$modules" ] || die "$kernel has no modules; LAB_KERNEL must name a kernel package"
mkdir -p "$tmp/base/lib/modules"
cp -rl "$modules" "$tmp/base/lib/modules/" 2>/dev/null || cp -r "$modules" "$tmp/base/lib/modules/"
depmod -b "$tmp/base" "$version"

root=$tmp/root
mkdir -p "$root"/{bin,proc,sys,dev,job,checkout,newroot,modules}
install -m 755 "$here/init" "$root/init"
install -m 755 "$here/main" "$root/bin/main"
install -m 755 "$busybox" "$root/bin/busybox"
for module in "${wanted[@]}"; do
    # Debian's own modprobe.d has nothing to say about the lab's kernel, hence -C.
    modprobe -C /dev/null -d "$tmp/base" -S "$version" --show-depends "$module" ||
        die "Linux $version has no module $module; give another package in LAB_KERNEL"
done | sed -n 's/^insmod \(.*\.ko[.a-z]*\).*/\1/p' | awk '!seen[$0]++' >"$tmp/order"
while read -r file; do
    name=$(basename "$file" | sed 's/\.ko.*/.ko/')
    case $file in # busybox's insmod takes plain files only
    *.xz) xz -dc "$file" ;;
    *.zst) zstd -dcq "$file" ;;
    *.gz) gzip -dc "$file" ;;
    *) cat "$file" ;;
    esac >"$root/modules/$name"
    printf '%s\n' "$name" >>"$root/modules/order"
done <"$tmp/order"

find "$root" -exec touch -h -d @0 {} +
(cd "$root" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 --reproducible) >"$tmp/initramfs.cpio"

for file in vmlinuz vmlinux version; do
    [ -e "$kernel/$file" ] || continue                 # vmlinux, of another architecture
    [ ! "$kernel/$file" -ef "$out/$file" ] || continue # linked there by an earlier build
    cp -l "$kernel/$file" "$tmp/" 2>/dev/null || cp "$kernel/$file" "$tmp/"
    mv "$tmp/$file" "$out/"
done
mv "$tmp/initramfs.cpio" "$out/"
printf '%s\n' "$stamp" >"$out/.stamp"
say "${out#"$top"/} is ready: Linux $version, $(wc -l <"$root/modules/order") modules"
