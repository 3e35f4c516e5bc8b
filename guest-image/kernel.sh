#!/usr/bin/env bash
# Fetches a Debian kernel without installing it, and prints the directory it was unpacked to:
#   vmlinuz   as the package ships it (not there if a vmlinux file was given)
#   vmlinux   the same kernel uncompressed: an emulated CPU need not decompress it at every boot (x86 only)
#   version   what `uname -r` will say
#   root/     the package's files (modules, config); empty for a kernel given as a file
#
# usage: kernel.sh default | newest | PACKAGE | FILE | SUITE:default | SUITE:newest | SUITE:PACKAGE
#   default   what linux-image-amd64 depends on (or linux-image-arm64)
#   newest    the highest version of the full flavour that any package source offers
#   PACKAGE   e.g. linux-image-6.12-amd64 (the newest image it stands for), or an image package
#   FILE      a vmlinuz or a vmlinux
#   SUITE:    of another suite of Debian, trixie-backports:newest say
#
# KERNEL_ARCH=arm64: the same for that architecture, packages only. For that and for other suites the lists of packages are
# some of their own, see foreign.sh.
#
# Nothing here knows a kernel version: mirrors drop old ones, so a written-down one stops working.
set -euo pipefail

me=guest-image/kernel.sh
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
store=$top/target/kernels
arch=${KERNEL_ARCH:-amd64}
flavour="^linux-image-[0-9][^-]*(-[0-9]+)?-$arch\$" # leaves out cloud, rt, unsigned and dbg
lists=/var/lib/apt/lists

say() { printf '%s: %s\n' "$me" "$*" >&2; }
die() { say "error: $*"; exit 1; }

tmp=
trap '[ -z "$tmp" ] || rm -rf "$tmp"' EXIT

# The package lists, fetched anew; a container image usually comes without any.
update_lists() { # WHY
    say "$1: running apt-get update"
    if [ "$(id -u)" = 0 ] || [ -n "${APT_CONFIG:-}" ]; then
        apt-get update -qq >&2
    elif sudo -n true 2>/dev/null; then
        sudo -n apt-get update -qq >&2
    else
        say "apt-get update needs root; run 'sudo apt-get update' and then this again"
        return 1
    fi
}

candidate() { # PACKAGE: the version apt would install, nothing if it offers none
    LC_ALL=C apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'
}

# Follows a meta package to the image it depends on; an image package stands for itself.
image_of() {
    local next
    next=$(apt-cache show --no-all-versions "$1" 2>/dev/null |
        sed -n 's/^Depends: *//p' | tr ',' '\n' | awk '{ print $1 }' | grep -E '^linux-image-' | head -n 1) || true
    if [ -n "$next" ] && [ "$next" != "$1" ]; then image_of "$next"; else printf '%s\n' "$1"; fi
}

# One call for all names: each start of apt-cache reads every package list.
newest() {
    # shellcheck disable=SC2046 # package names hold no blanks
    apt-cache show --no-all-versions $(apt-cache search --names-only "$flavour" | awk '{ print $1 }') 2>/dev/null |
        awk 'function out() { if (name != "" && !meta) print version, name; name = ""; meta = 0 }
            $1 == "Package:" { out(); name = $2 }
            $1 == "Version:" { version = $2 }
            $1 == "Depends:" && / linux-image-/ { meta = 1 }
            END { out() }' | sort -V | awk 'END { print $2 }'
}

# The packages that an image package is made of: itself, and where it is empty those with the kernel, its modules and their lists.
parts_of() { # PACKAGE
    local version=${1#linux-image-}
    printf '%s\n' "$1"
    apt-cache show --no-all-versions "$1" 2>/dev/null | sed -n 's/^\(Pre-\)\?Depends: *//p' | tr ',' '\n' | awk '{ print $1 }' |
        grep -xF -e "linux-binary-$version" -e "linux-modules-$version" -e "linux-base-$version" || true
}

resolve() { # the image package for the wish; nothing if the lists do not have it
    case $1 in
    default) [ -z "$(candidate "linux-image-$arch")" ] || image_of "linux-image-$arch" ;;
    newest) newest ;;
    *) [ -z "$(candidate "$1")" ] || image_of "$1" ;;
    esac
}

number() { # FILE OFFSET BYTES: a little-endian number
    od -An -v -t "u$3" -j "$2" -N "$3" --endian=little "$1" | tr -d ' '
}

# Cuts the kernel proper out of a bzImage. The setup header says where the payload is, so no
# magic number has to be searched for (they do occur by chance in 10 MB of compressed data).
cut_vmlinux() { # VMLINUZ VMLINUX
    local sects begin length unpack tail=4 want got
    [ "$(number "$1" 514 4)" = 1400005704 ] || # "HdrS"
        die "$1 is neither an ELF vmlinux nor a bzImage; give a kernel of this architecture"
    sects=$(number "$1" 497 1)
    [ "$sects" != 0 ] || sects=4 # the boot protocol's meaning of 0
    begin=$(((sects + 1) * 512 + $(number "$1" 584 4)))
    length=$(number "$1" 588 4)
    case $(od -An -v -t x1 -j "$begin" -N 4 "$1" | tr -d ' ') in
    fd377a58) unpack='xz -dc --single-stream' ;;
    28b52ffd) unpack='zstd -dcq' ;;
    02214c18) unpack='lz4 -dc' ;;
    1f8b*) unpack='gzip -dc' tail=0 ;; # its own trailer holds the size
    425a68*) unpack='bzip2 -dc' ;;
    5d0000*) unpack='xz -dc --format=lzma' ;;
    *) die "$1 is compressed in a way this script does not know; give its vmlinux instead" ;;
    esac
    command -v "${unpack%% *}" >/dev/null || die "${unpack%% *} is needed for $1; run tests/lab/setup.sh"
    dd if="$1" bs=1M iflag=skip_bytes,count_bytes skip="$begin" count=$((length - tail)) status=none |
        $unpack >"$2" ||
        die "the payload of $1 does not decompress; the file is damaged"
    want=$(number "$1" $((begin + length - 4)) 4) got=$(stat -c %s "$2")
    [ "$want" = "$got" ] || die "$1 says it holds $want bytes, but $got came out; the file is damaged"
}

is_elf() { [ "$(od -An -v -t x1 -N 4 "$1" | tr -d ' ')" = 7f454c46 ]; }

finish() { # DIRECTORY: moves what is complete into its place, in one step
    mv -T "$tmp" "$1" 2>/dev/null || [ -e "$1/version" ] || die "cannot create $1"
}

[ $# = 1 ] || die "usage: kernel.sh default | newest | PACKAGE | FILE | SUITE:default | SUITE:newest | SUITE:PACKAGE"
mkdir -p "$store"
case $arch in
amd64 | arm64) ;;
*) die "KERNEL_ARCH=$arch is not an architecture that this knows; expected amd64 or arm64" ;;
esac
suite=
if [[ $1 =~ ^([a-z][a-z0-9-]*):(.+)$ ]] && [ ! -f "$1" ]; then
    suite=${BASH_REMATCH[1]}
    set -- "${BASH_REMATCH[2]}"
fi
if [ "$arch" != amd64 ] || [ -n "$suite" ]; then
    [ ! -f "$1" ] || die "$1 is a file, and packages alone are of another architecture or suite"
    APT_CONFIG=$("$top/guest-image/foreign.sh" "$arch" ${suite:+"$suite"}) || die "there is no apt for $arch $suite (see above)"
    export APT_CONFIG
    lists=$(dirname "$APT_CONFIG")/state/lists
fi

if [ -f "$1" ]; then
    dir=$store/file-$(sha256sum "$1" | cut -c 1-16)
    if [ ! -e "$dir/version" ]; then
        tmp=$(mktemp -d "$store/.new.XXXXXX")
        mkdir "$tmp/root"
        if is_elf "$1"; then
            cp "$1" "$tmp/vmlinux"
        else
            cut_vmlinux "$1" "$tmp/vmlinux"
            cp "$1" "$tmp/vmlinuz"
        fi
        LC_ALL=C grep -aom1 'Linux version [0-9][^ ]*' "$tmp/vmlinux" | head -n 1 |
            cut -d ' ' -f 3 >"$tmp/version" || die "$1 does not look like a Linux kernel"
        finish "$dir"
    fi
    printf '%s\n' "$dir"
    exit 0
fi
case $1 in */*) die "there is no file $1; KERNEL is a package name or the path of a vmlinuz or vmlinux" ;; esac
command -v apt-cache >/dev/null || die "this machine has no apt; give the path of a vmlinuz or vmlinux instead of '$1'"

# What this wish meant last time holds until apt is told something new; asking takes seconds.
memory=$store/.${APT_CONFIG:+$arch.}${suite:+$suite.}$1
known=$store/$(cat "$memory" 2>/dev/null || true)
[ -s "$memory" ] && [ -e "$known/version" ] || known=
if [ -n "$known" ] && [ -z "$(find "$lists" /etc/apt -newer "$memory" -print -quit 2>/dev/null)" ]; then
    printf '%s\n' "$known"
    exit 0
fi
# Without package lists and without the means to get them, an earlier download still makes a guest.
give_up() {
    [ -n "$known" ] || die "$*"
    say "$*; using $(basename "$known"), fetched earlier"
    printf '%s\n' "$known"
    exit 0
}

# Lists that came with a machine's image may be years old, and miss whole kernels.
if [ -z "$(find "$lists" -maxdepth 0 -mtime -7 2>/dev/null)" ]; then
    update_lists "the package lists are more than a week old" || say "going on with the old ones"
fi
image=$(resolve "$1") || true # apt-cache fails where it knows nothing
if [ -z "$image" ]; then
    update_lists "the package lists have no kernel for '$1'" || give_up "the package lists cannot be fetched (see above)"
    image=$(resolve "$1") || true
    [ -n "$image" ] || give_up "no package source offers '$1'; give another package or the path of a vmlinuz"
fi
dir=$store/${image}_$(candidate "$image")
if [ ! -e "$dir/version" ]; then
    tmp=$(mktemp -d "$store/.new.XXXXXX")
    mkdir "$tmp/deb" "$tmp/root"
    # root would otherwise hand the download to the user _apt, who cannot write here
    fetch() {
        local parts
        mapfile -t parts < <(parts_of "$image")
        (cd "$tmp/deb" && apt-get download -qq -o APT::Sandbox::User=root "${parts[@]}" >&2)
    }
    say "downloading $image"
    if ! fetch; then
        update_lists "the download failed, perhaps because the package lists are old" ||
            give_up "the package lists cannot be fetched (see above)"
        image=$(resolve "$1") || true
        dir=$store/${image}_$(candidate "$image")
        fetch || give_up "cannot download $image; are this machine's package sources reachable?"
    fi
    say "unpacking $image"
    for deb in "$tmp"/deb/*.deb; do dpkg-deb -x "$deb" "$tmp/root"; done
    rm -r "$tmp/deb"
    # The newer packages have nothing in /boot.
    kernel=$(find "$tmp/root/boot" "$tmp/root/usr/lib/modules" "$tmp/root/lib/modules" -maxdepth 2 -type f -name 'vmlinuz*' -print \
        -quit 2>/dev/null) || true
    [ -n "$kernel" ] || die "there is no kernel in $image and what it is made of"
    mv "$kernel" "$tmp/vmlinuz"
    [ "$arch" != amd64 ] || cut_vmlinux "$tmp/vmlinuz" "$tmp/vmlinux"
    find "$tmp/root/usr/lib/modules" "$tmp/root/lib/modules" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' -quit 2>/dev/null \
        >"$tmp/version" || true
    [ -s "$tmp/version" ] || die "$image has no modules, and so no version"
    chmod 755 "$tmp" # mktemp made it private
    finish "$dir"
fi
basename "$dir" >"$memory.new.$$"
mv "$memory.new.$$" "$memory"
printf '%s\n' "$dir"
