#!/usr/bin/env bash
# Fetches the newest QEMU that Debian offers for this machine's release, its backports included,
# without installing it: unpacked below target/peer/. Prints the path of a command that runs it, and
# says on standard error which version that is. If it is not to be had, the command runs the
# installed QEMU.
#
# usage: qemu.sh [SUITE]
#
# With a SUITE of Debian (trixie, trixie-backports, sid ...) it is that one's QEMU, unpacked below
# target/peer/SUITE/, and an error if it is not to be had. A QEMU of another release than this machine's
# comes with its own C library and loader.
#
# The mirror is the one this machine's own package sources name; its apt configuration, its package
# lists and its packages stay as they are.
set -euo pipefail

me=tests/peer/qemu.sh
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ ${1:-} =~ ^[a-z-]*$ ]] || { echo "$me: error: $1 is not a suite of Debian, such as trixie-backports" >&2; exit 2; }
store=$top/target/peer${1:+/$1}
root=$store/root
command=$store/qemu

asked=${1:-}
say() { printf '%s: %s\n' "$me" "$*" >&2; }
version() { timeout 60 "$1" --version | sed -n 's/^QEMU emulator version //p'; }
answer() { # WHAT
    local version
    version=$(version "$command") || version=
    if [ -z "$version" ]; then
        say "error: $command does not run (see above)"
        exit 1
    fi
    say "QEMU $version, $1"
    printf '%s\n' "$command"
    exit 0
}
write_command() { # its text on standard input
    cat >"$command.new"
    chmod 755 "$command.new"
    mv "$command.new" "$command"
}
# The command of an earlier run, if that had fetched one, else the installed QEMU.
give_up() { # WHY
    say "$1"
    [ ! -e "$store/.fetched" ] || answer "fetched earlier"
    [ -z "$asked" ] || { say "error: no QEMU of $asked"; exit 1; }
    printf '#!/bin/sh\nexec qemu-system-x86_64 "$@"\n' | write_command
    answer "the installed one, as no newer one is to be had"
}

mkdir -p "$store"
exec 8>"$store/.lock"
flock 8
# What backports offer changes rarely; a week is what guest-image/kernel.sh gives package lists too.
if [ -e "$store/.fetched" ] && [ -z "$(find "$store/.fetched" -mtime +7)" ]; then
    answer "fetched earlier"
fi
command -v apt-get >/dev/null || give_up "this machine has no apt"

release=$(. /etc/os-release 2>/dev/null && printf '%s' "${VERSION_CODENAME:-}") || true
# shellcheck disable=SC2016 # apt's own variables
mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)' 'Created-By: Packages' |
    awk -v release="$release" '($2 == release || $2 == "stable") && $3 == "main" && ($4 == "Debian" || $4 ~ /ORIGIN/) { print $1; exit }') || true
if [ -z "$release" ] || [ -z "$mirror" ]; then
    give_up "this machine's package sources name no mirror of a Debian release"
fi

suite=${asked:-$release-backports}
foreign=
[ "${suite%-backports}" = "$release" ] || foreign=1

apt=$store/apt
mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
signed=
[ ! -e "$keyring" ] || signed="[signed-by=$keyring] "
for one in $(printf '%s\n' "${suite%-backports}" "$suite" | sort -u); do
    printf 'deb %s%s %s main\n' "$signed" "$mirror" "$one"
done >"$apt/sources.list"
options=(
    -qq
    -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=-
    -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache"
    -o APT::Sandbox::User=root # root would otherwise hand downloads to _apt, who cannot write here
    -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false -o Acquire::Languages=none
    -o Debug::NoLocking=1 -o APT::Update::Error-Mode=any
)
if [ -n "$foreign" ]; then
    : >"$apt/status" # nothing that is installed here counts
    options+=(-o "Dir::State::status=$apt/status")
fi
say "asking for QEMU in $suite"
timeout 600 apt-get "${options[@]}" update >&2 || give_up "its package lists cannot be fetched (see above)"

# Everything that installing it would put on or replace on this machine; the rest is there already.
plan=$(LC_ALL=C apt-get "${options[@]}" -s -t "$suite" --no-install-recommends install qemu-system-x86) ||
    give_up "it cannot be had from $suite (see above)"
mapfile -t packages < <(sed -n 's/^Inst \([^ ]*\) .*(\([^ ]*\) .*/\1=\2/p' <<<"$plan")
[ ${#packages[@]} != 0 ] || give_up "$suite has none that is newer than the installed one"

if [ "$(cat "$store/.fetched" 2>/dev/null)" != "${packages[*]}" ]; then
    say "downloading ${packages[*]}"
    rm -rf "$store/deb" "$root.new"
    mkdir -p "$store/deb" "$root.new"
    (cd "$store/deb" && timeout 1800 apt-get "${options[@]}" download "${packages[@]}" >&2) ||
        give_up "that cannot be downloaded (see above)"
    for deb in "$store"/deb/*.deb; do
        dpkg-deb -x "$deb" "$root.new"
    done
    rm -rf "$store/deb" "$store/.fetched" "$root"
    mv "$root.new" "$root"
    libraries=$root/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || echo x86_64-linux-gnu)
    quote() { printf "'%s'" "${1//\'/\'\\\'\'}"; }
    if [ -n "$foreign" ]; then
        loader=$root/usr/lib64/ld-linux-x86-64.so.2
        # Before trixie the C library was packed outside /usr.
        [ -e "$loader" ] || loader=$root/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2
        write_command <<-END
	#!/bin/sh
	QEMU_MODULE_DIR=$(quote "$libraries/qemu")
	export QEMU_MODULE_DIR
	exec $(quote "$loader") --library-path $(quote "$libraries:$root/lib/x86_64-linux-gnu") $(quote "$root/usr/bin/qemu-system-x86_64") -L $(quote "$root/usr/share/qemu") -L $(quote "$root/usr/share/seabios") "\$@"
	END
    else
        write_command <<-END
	#!/bin/sh
	LD_LIBRARY_PATH=$(quote "$libraries")\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
	QEMU_MODULE_DIR=$(quote "$libraries/qemu")
	export LD_LIBRARY_PATH QEMU_MODULE_DIR
	exec $(quote "$root/usr/bin/qemu-system-x86_64") -L $(quote "$root/usr/share/qemu") -L $(quote "$root/usr/share/seabios") "\$@"
	END
    fi
    [ -n "$(version "$command")" ] || give_up "what was fetched does not run on this machine (see above)"
    printf '%s\n' "${packages[*]}" >"$store/.fetched"
fi
touch "$store/.fetched"
answer "fetched from $suite, not installed"
