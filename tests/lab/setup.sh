#!/usr/bin/env bash
# Installs what the lab and the guest image need on a Debian machine, and only what is missing.
# Kernels are not among it: guest-image/kernel.sh unpacks them under target/.
set -euo pipefail

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
PATH=$PATH:/usr/sbin:/sbin # where kmod's tools are, off an ordinary user's path

missing=()
need() { # COMMAND PACKAGE, or FILE PACKAGE
    case $1 in
    /*) [ -e "$1" ] || missing+=("$2") ;;
    *) command -v "$1" >/dev/null || missing+=("$2") ;;
    esac
}
[ -n "${LAB_QEMU:-}" ] || need qemu-system-x86_64 qemu-system-x86
need cpio cpio
need depmod kmod
need modprobe kmod
need xz xz-utils
need zstd zstd
need flock util-linux
need setpriv util-linux
for one in ${NEED:-}; do # what one command alone wants: COMMAND, COMMAND:PACKAGE or FILE:PACKAGE
    need "${one%%:*}" "${one##*:}"
done
# For the fuzzer of the API, which lives in an environment of its own below target/.
if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    missing+=(python3 python3-venv)
fi
# The package busybox has the same name but needs the C library, which no initramfs here has.
if ! command -v busybox >/dev/null || ldd "$(command -v busybox)" >/dev/null 2>&1; then
    missing+=(busybox-static)
fi
[ ${#missing[@]} != 0 ] || exit 0

mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
command -v apt-get >/dev/null ||
    die "missing: ${missing[*]} (Debian's package names); this machine has no apt-get, install them its own way"
as_root=()
if [ "$(id -u)" != 0 ]; then
    if sudo -n true 2>/dev/null || { [ -t 0 ] && command -v sudo >/dev/null; }; then
        as_root=(sudo)
    else
        die "missing: ${missing[*]}; installing needs root: apt-get install ${missing[*]}"
    fi
fi
say "installing ${missing[*]}"
install() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}
if ! install; then
    # A container image usually comes without package lists, or with lists that have grown old.
    say "that failed; fetching the package lists and trying again"
    "${as_root[@]}" apt-get update -qq >&2 || die "apt-get update failed (see above)"
    install || die "cannot install ${missing[*]}; are this machine's package sources reachable?"
fi
