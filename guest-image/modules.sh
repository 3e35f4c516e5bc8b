#!/usr/bin/env bash
# Puts modules of a kernel, and those that they need, into a folder of an initramfs: plain files, since busybox's
# insmod takes no others, and their names in the file `order`, each behind those that it needs.
#
# usage: modules.sh KERNEL FOLDER MODULE...
#   KERNEL   what kernel.sh printed
#
# What the kernel has built in or does not have is left out without a word, and a kernel that was given as a file
# comes without any module: what needs one says so in the guest.
set -euo pipefail

[ $# -ge 2 ] || { echo 'usage: modules.sh KERNEL FOLDER MODULE...' >&2; exit 2; }
kernel=$1 folder=$2
shift 2
PATH=$PATH:/usr/sbin:/sbin # depmod and modprobe, off an ordinary user's path

mkdir -p "$folder"
version=$(cat "$kernel/version")
# Wherever the package has them (/usr/lib in newer ones).
modules=$(find "$kernel/root" -maxdepth 4 -type d -path "*/lib/modules/$version" -print -quit)
[ -n "$modules" ] || exit 0

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/lib/modules/$version"
# depmod writes beside the modules, and the package's files stay as they are.
ln -s "$(realpath "$modules")/kernel" "$tmp/lib/modules/$version/kernel"
cp "$modules"/modules.{builtin,builtin.modinfo,order} "$tmp/lib/modules/$version/" 2>/dev/null || true
depmod -b "$tmp" "$version"

for module in "$@"; do
    # This machine's own modprobe.d has nothing to say about the guest's kernel, hence -C.
    modprobe -C /dev/null -d "$tmp" -S "$version" --show-depends "$module" 2>/dev/null || true
done | sed -n 's/^insmod \(.*\.ko[.a-z]*\).*/\1/p' | awk '!seen[$0]++' >"$tmp/order"
while read -r file; do
    name=$(basename "$file" | sed 's/\.ko.*/.ko/')
    case $file in
    *.xz) xz -dc "$file" ;;
    *.zst) zstd -dcq "$file" ;;
    *.gz) gzip -dc "$file" ;;
    *) cat "$file" ;;
    esac >"$folder/$name"
    printf '%s\n' "$name" >>"$folder/order"
done <"$tmp/order"
