#!/usr/bin/env bash
# Whether the Debian package is whole: what is in it, whose it is, that it works where it is unpacked, that it is made the same
# twice; and, as root and with target/debian-packages (make guest-image-debian), that it installs and leaves nothing, and
# that its unit runs a VM (tests/service-live.sh). `make deb-check` has built the binary.
# shellcheck disable=SC2015 # A && B || die: both have to hold
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export LC_ALL=C.UTF-8
packages=target/debian-packages/packages.tar.zst

say() { printf 'tests/deb.sh: %s\n' "$*"; }
die() { printf 'tests/deb.sh: error: %s\n' "$*" >&2; exit 1; }
skip() { printf 'SKIPPED %s\n' "$*" >&2; }

deb=$(packaging/deb.sh)
mkdir -p target/tests
tmp=$(mktemp -d -p target/tests deb.XXXXXX)
trap 'rm -rf "$tmp"' EXIT
cp "$deb" "$tmp/first.deb"
packaging/deb.sh >/dev/null
cmp "$deb" "$tmp/first.deb" || die "the same binary and the same time made another package"

# Its fields.
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
field() { # NAME VALUE
    local has
    has=$(dpkg-deb -f "$deb" "$1")
    [ "$has" = "$2" ] || die "field $1 is \"$has\", expected \"$2\""
}
dpkg-deb --info "$deb" >/dev/null
field Package mce-relay
field Version "$version"
field Architecture amd64
field Section admin
field Depends '' # the binary is static
[ "$(basename "$deb")" = "mce-relay_${version}_amd64.deb" ] || die "the package is called $deb"

# Whose, and with what modes.
strange=$(dpkg-deb -c "$deb" | awk '$2 != "root/root" || $1 !~ /^(drwxr-xr-x|-rw-r--r--)$/ { print $1, $2, $6 }')
[ "$strange" = '-rwxr-xr-x root/root ./usr/bin/mce-relay' ] ||
    die "beside the program all is root's and mode 644, and directories 755; but: $strange"

# What is in it.
root=$tmp/root
dpkg-deb -R "$deb" "$root"
for path in usr/bin/mce-relay lib/systemd/system/mce-relay@.service usr/lib/sysusers.d/mce-relay.conf \
    etc/mce-relay/example.conf usr/share/man/man1/mce-relay.1.gz usr/share/man/man1/mce-relay-run.1.gz \
    usr/share/bash-completion/completions/mce-relay usr/share/zsh/vendor-completions/_mce-relay \
    usr/share/fish/vendor_completions.d/mce-relay.fish \
    usr/share/doc/mce-relay/{README.md,CHANGELOG.md,changelog.gz,copyright,docs/production.md}; do
    [ -s "$root/$path" ] || die "$path is not in the package, or empty"
done
for file in docs/*.md; do
    cmp "$file" "$root/usr/share/doc/mce-relay/$file" || die "$file is not in the package"
done
cmp packaging/mce-relay@.service "$root/lib/systemd/system/mce-relay@.service"
for licence in Apache-2.0 BSD-3-Clause; do
    grep -q "^License: $licence$" "$root/usr/share/doc/mce-relay/copyright" || die "copyright has no $licence"
done
(cd "$root" && md5sum --quiet -c DEBIAN/md5sums) || die "md5sums is wrong"
counted=$(find "$root" -type f -not -path '*/DEBIAN/*' | wc -l)
listed=$(cat "$root/DEBIAN/md5sums" "$root/DEBIAN/conffiles" | wc -l)
[ "$counted" = "$listed" ] || die "$counted files, and $listed in md5sums and conffiles"

# What is in it works.
program=$root/usr/bin/mce-relay
[ "$("$program" --version)" = "mce-relay $version" ] || die "the program is \"$("$program" --version)\""
ldd "$program" 2>&1 | grep -qE 'statically linked|not a dynamic' || die "the program needs libraries: $(ldd "$program")"
pages=("$root"/usr/share/man/man1/*.gz)
commands=$("$program" man "$tmp/man" | wc -l)
[ ${#pages[@]} = "$commands" ] || die "${#pages[@]} manual pages, and the program writes $commands"
if command -v man >/dev/null; then
    for page in "${pages[@]}"; do
        man --warnings -E UTF-8 -l "$page" >"$tmp/page" 2>"$tmp/warnings"
        [ -s "$tmp/page" ] && [ ! -s "$tmp/warnings" ] || die "man does not render $page: $(cat "$tmp/warnings")"
    done
else
    skip 'manual pages: there is no man here (package man-db)'
fi
share=$root/usr/share
for one in "bash $share/bash-completion/completions/mce-relay" "zsh $share/zsh/vendor-completions/_mce-relay" \
    "fish $share/fish/vendor_completions.d/mce-relay.fish"; do
    if command -v "${one%% *}" >/dev/null; then
        "${one%% *}" -n "${one#* }" || die "${one%% *} does not take its completions"
    else
        skip "completions for ${one%% *}: it is not installed"
    fi
done
# The example's options are options: what fails here is a file that is not there (status 1), not the command line (2). As systemd
# reads it: split at blanks, but for quotes.
status=0
(
    # shellcheck disable=SC1091 # it is in the package
    . "$root/etc/mce-relay/example.conf"
    eval "options=($OPTIONS)"
    # shellcheck disable=SC2154 # eval assigns it
    "$program" run --name mce-relay-deb-test "${options[@]}"
) >"$tmp/run" 2>&1 || status=$?
[ "$status" = 1 ] && grep -q 'example.* not there' "$tmp/run" || die "the example ends with status $status: $(cat "$tmp/run")"
say "what is in the package is whole: $counted files, ${#pages[@]} manual pages"
tests/service.sh

# In Debian.
if [ "$(id -u)" != 0 ]; then
    skip 'installing in a chroot, and a VM of the unit: that needs root'
    exit 0
elif [ ! -e "$packages" ]; then
    skip "installing in a chroot, and a VM of the unit: there is no $packages (make guest-image-debian)"
    exit 0
fi
debian=$tmp/debian
mkdir "$debian"
zstd -dcq "$packages" | tar -x -C "$debian"
mkdir -p "$debian/dev"
mknod -m 666 "$debian/dev/null" c 1 3
cp "$deb" "$debian/root/mce-relay.deb"
inside() { chroot "$debian" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"; }
files() { # but for what dpkg notes, and copies of the lists of users
    inside find / -xdev -not -path '/var/lib/dpkg/*' -not -path '/var/log/dpkg.log' -not -path '/etc/*-' \
        -not -path /etc/.pwd.lock | sort
}
files >"$tmp/before"
inside dpkg -i /root/mce-relay.deb >"$tmp/dpkg" 2>&1 || die "dpkg -i fails: $(cat "$tmp/dpkg")"
[ "$(inside mce-relay --version)" = "mce-relay $version" ] || die 'the installed program does not run'
inside getent passwd mce-relay | grep -q ':/var/lib/mce-relay:/usr/sbin/nologin$' ||
    die "user mce-relay is \"$(inside getent passwd mce-relay)\""
inside getent group kvm >/dev/null || die 'there is no group kvm'
[ -z "$(find "$debian/etc/systemd" -name 'mce-relay*')" ] || die 'installing enabled a VM'
# Another version, as it were, and what an administrator and a VM would leave.
inside dpkg -i /root/mce-relay.deb >"$tmp/dpkg" 2>&1 || die "dpkg -i over itself fails: $(cat "$tmp/dpkg")"
inside sh -ec 'mkdir -p /var/log/mce-relay/vm1 /etc/systemd/system/multi-user.target.wants
    echo x >/var/log/mce-relay/vm1/console
    ln -s /lib/systemd/system/mce-relay@.service /etc/systemd/system/multi-user.target.wants/mce-relay@vm1.service'
inside dpkg -r mce-relay >"$tmp/dpkg" 2>&1 || die "dpkg -r fails: $(cat "$tmp/dpkg")"
[ ! -e "$debian/usr/bin/mce-relay" ] && [ -e "$debian/etc/mce-relay/example.conf" ] ||
    die 'dpkg -r leaves the program, or takes the configuration'
inside dpkg -P mce-relay >"$tmp/dpkg" 2>&1 || die "dpkg -P fails: $(cat "$tmp/dpkg")"
files >"$tmp/after"
diff "$tmp/before" "$tmp/after" >"$tmp/left" || die "dpkg -P leaves, or takes: $(cat "$tmp/left")"
# As other packages leave theirs: a user who comes later is not given what this one owned.
inside getent passwd mce-relay >/dev/null || die 'user mce-relay is gone'
say 'it installs, enables nothing, and leaves nothing but its user'

tests/service-live.sh "$debian"
