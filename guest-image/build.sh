#!/usr/bin/env bash
# Builds the guest: target/guest-image/{vmlinuz,vmlinux,initramfs.cpio,initramfs-crash.cpio,version}.
# The second initramfs is the first and, below /crash, what the agent loads as crash kernel.
#
# KERNEL=            the guest's kernel: a package, of another suite as SUITE:PACKAGE, or the path of a vmlinuz or vmlinux
#                    (unset: what linux-image-amd64 depends on); kernel.sh has more
# GUEST_IMAGE_DIR=   where to put it instead, for a second guest beside the first
#
# Cheap when nothing has changed, so that every run of the tests can begin with it.
set -euo pipefail

me=guest-image/build.sh
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(dirname "$here")
out=${GUEST_IMAGE_DIR:-$top/target/guest-image}

say() { printf '%s: %s\n' "$me" "$*" >&2; }
die() { say "error: $*"; exit 1; }

"$top/tests/lab/setup.sh"
command -v cargo >/dev/null || die "cargo is missing; install Rust (https://rustup.rs) and put cargo on the path"

# Static, as the image has no C library; stripped, as every byte is unpacked by an emulated CPU.
# A target directory of its own keeps these flags from rebuilding the workspace back and forth.
(
    cd "$top"
    unset CARGO_ENCODED_RUSTFLAGS # would silently win over RUSTFLAGS
    RUSTFLAGS='-C target-feature=+crt-static -C strip=symbols' cargo build --quiet --release --locked \
        -p mce-relay-agent --target x86_64-unknown-linux-gnu --target-dir "$top/target/agent" >&2
) || die "the guest agent does not build (see above)"
agent=$top/target/agent/x86_64-unknown-linux-gnu/release/agent
busybox=$(command -v busybox)

kernel=$("$here/kernel.sh" "${KERNEL:-default}")

# The stamp goes first and comes back last: an interrupted run is then seen as out of date.
stamp=$({ echo "$kernel"; cat "$here"/{build.sh,modules.sh,init,power-button} "$busybox" "$agent"; } | sha256sum)
if [ "$(cat "$out/.stamp" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
mkdir -p "$out"
rm -f "$out/.stamp"
tmp=$(mktemp -d "$out/.new.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

root=$tmp/root
mkdir -p "$root"/{bin,sbin,proc,sys,dev,tmp,modules,etc/acpi/PWRF}
install -m 755 "$here/power-button" "$root/etc/acpi/PWRF/00000080" # where busybox's acpid looks for it
install -m 755 "$here/init" "$root/init"
install -m 755 "$agent" "$root/sbin/agent"
install -m 755 "$busybox" "$root/bin/busybox"
"$busybox" --list | while read -r applet; do
    [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
done
# What the guest says of its own end by, and hears of its power button by, each before what needs it. A kernel
# that was given as a file comes without modules, and one may have them built in.
"$here/modules.sh" "$kernel" "$root/modules" pvpanic pvpanic-mmio button evdev
# The devices of a virtual machine that has any.
"$here/modules.sh" "$kernel" "$root/modules/virtio" \
    virtio_mmio virtio_blk virtio_net vmw_vsock_virtio_transport virtio_rng virtio_console
# Not compressed: an emulated CPU copies faster than it decompresses. Same input, same bytes.
find "$root" -exec touch -h -d @0 {} +
(cd "$root" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 --reproducible) >"$tmp/initramfs.cpio"
# Of several archives one behind the other the kernel unpacks each.
if [ -e "$kernel/vmlinuz" ]; then # a kernel given as vmlinux has none
    mkdir -p "$tmp/crash/crash"
    cp "$kernel/vmlinuz" "$tmp/initramfs.cpio" "$tmp/crash/crash/"
    find "$tmp/crash" -exec touch -h -d @0 {} +
    (cd "$tmp/crash" && find crash | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 --reproducible) |
        cat "$tmp/initramfs.cpio" - >"$tmp/initramfs-crash.cpio"
fi

# Each file is moved into place whole, so a virtual machine started meanwhile never reads half of one.
for file in vmlinuz vmlinux version; do
    [ ! "$kernel/$file" -ef "$out/$file" ] || continue # linked there by an earlier build
    if [ -e "$kernel/$file" ]; then
        cp -l "$kernel/$file" "$tmp/" 2>/dev/null || cp "$kernel/$file" "$tmp/"
        mv "$tmp/$file" "$out/"
    else
        rm -f "$out/$file" # a kernel given as vmlinux has no vmlinuz
    fi
done
mv "$tmp/initramfs.cpio" "$out/"
rm -f "$out/initramfs-crash.cpio"
[ ! -e "$tmp/initramfs-crash.cpio" ] || mv "$tmp/initramfs-crash.cpio" "$out/"
printf '%s\n' "$stamp" >"$out/.stamp"
say "${out#"$top"/} is ready: Linux $(cat "$out/version"), initramfs of $(($(stat -c %s "$out/initramfs.cpio") / 1024)) KiB"
