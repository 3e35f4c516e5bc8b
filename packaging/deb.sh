#!/usr/bin/env bash
# Makes target/deb/mce-relay_VERSION_amd64.deb from target/dist/mce-relay (make dist), without its debug information.
# Its last line of output is the package's path.
#
# SOURCE_DATE_EPOCH=  the time of everything in it; that of the last commit otherwise. The same binary and the same time
#                     make the same package, byte for byte.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'packaging/deb.sh: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

binary=${CARGO_TARGET_DIR:-target}/dist/mce-relay
[ -x "$binary" ] || die "$binary is not there; \`make deb\` builds it"
for tool in dpkg-deb strip; do
    command -v "$tool" >/dev/null || die "$tool is not installed (Debian's packages dpkg and binutils)"
done
# The workspace's own version, which is the first in the file.
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
[ -n "$version" ] || die "Cargo.toml has no version in [workspace.package]"
"$binary" --version | grep -qx "mce-relay $version" ||
    die "$binary says it is \"$("$binary" --version)\", Cargo.toml says $version; \`make dist\` builds it again"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)} ||
    die "this is no git repository: give the time as SOURCE_DATE_EPOCH (seconds since 1970)"
export SOURCE_DATE_EPOCH LC_ALL=C
umask 022

out=target/deb
deb=$out/mce-relay_${version}_amd64.deb
mkdir -p "$out"
tmp=$(mktemp -d "$out/.new.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
root=$tmp/root
doc=$root/usr/share/doc/mce-relay

put() { # FILE WHERE: what nobody executes
    install -D -m 644 "$1" "$root/$2"
}
install -D -m 755 "$binary" "$root/usr/bin/mce-relay"
strip --strip-unneeded --remove-section=.comment "$root/usr/bin/mce-relay"

"$binary" man "$root/usr/share/man/man1" >/dev/null
gzip -9n "$root"/usr/share/man/man1/*
while read -r shell path; do
    mkdir -p "$root/usr/share/${path%/*}"
    "$binary" completions "$shell" >"$root/usr/share/$path"
done <<END
bash bash-completion/completions/mce-relay
zsh zsh/vendor-completions/_mce-relay
fish fish/vendor_completions.d/mce-relay.fish
END

put packaging/mce-relay@.service lib/systemd/system/mce-relay@.service
put packaging/mce-relay.sysusers usr/lib/sysusers.d/mce-relay.conf
put packaging/example.conf etc/mce-relay/example.conf
put packaging/debian/lintian-overrides usr/share/lintian/overrides/mce-relay

# In the places that they have for each other's links.
for file in README.md DESIGN.md CHANGELOG.md docs/*.md docs/*.svg docs/openapi.json; do
    put "$file" "usr/share/doc/mce-relay/$file"
done
{
    printf 'mce-relay (%s) unstable; urgency=medium\n\n' "$version"
    printf '  * What has changed is in CHANGELOG.md.\n\n'
    sed -n "s/^Maintainer: / -- /p" packaging/debian/control | tr '\n' ' '
    printf ' %s\n' "$(date -u -R -d "@$SOURCE_DATE_EPOCH")"
} >"$doc/changelog"
gzip -9n "$doc/changelog"
{
    cat packaging/debian/copyright
    sed 's/^$/./; s/^/ /' LICENSE-BSD-3-Clause
} >"$doc/copyright"

mkdir "$root/DEBIAN"
install -m 755 packaging/debian/{postinst,prerm,postrm} "$root/DEBIAN/"
(cd "$root" && find etc -type f | sort | sed 's,^,/,' >DEBIAN/conffiles)
(cd "$root" && find . -type f -not -path './DEBIAN/*' -not -path './etc/*' -printf '%P\n' | sort | xargs -d '\n' md5sum >DEBIAN/md5sums)
# As dpkg counts: whole KiB of each file, and one for each directory.
size=$(find "$root" -not -path '*/DEBIAN*' -printf '%y %s\n' |
    awk '{ sum += $1 == "f" ? int(($2 + 1023) / 1024) : 1 } END { print sum }')
sed "s/@VERSION@/$version/; s/@SIZE@/$size/" packaging/debian/control >"$root/DEBIAN/control"
find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

dpkg-deb --root-owner-group --threads-max=1 -Zxz --build "$root" "$tmp/deb" >/dev/null
mv "$tmp/deb" "$deb"
say "$(stat -c %s "$deb") bytes, $size KiB installed"
echo "$deb"
