#!/usr/bin/env bash
# Makes target/release-files/, all that a release has, for x86-64:
#   mce-relay-VERSION-x86_64-linux          the program, static, as it is in the package
#   mce-relay-VERSION-x86_64-linux.debug    its debug information (gdb, addr2line)
#   mce-relay_VERSION_amd64.deb
#   mce-relay-VERSION-sbom.cdx.json         the crates that the program is made of (CycloneDX 1.5)
#   SHA256SUMS                              of the files above
#
# The list of crates is cargo-cyclonedx's (`make release` builds it below target/tools). Without that tool there is no release:
# SBOM=off makes one without the list.
# SOURCE_DATE_EPOCH=  as for deb.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'packaging/release.sh: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

PATH=$PWD/target/tools/bin:$PATH
case ${SBOM:-on} in
on) cargo-cyclonedx cyclonedx --version >/dev/null 2>&1 ||
    die "cargo-cyclonedx is neither installed nor in target/tools (see above), so there is no list of the crates in the" \
        "program; SBOM=off makes a release without it" ;;
off) say 'NO SBOM: this release has no list of the crates in the program (SBOM=off)' ;;
*) die "SBOM=$SBOM is neither on nor off" ;;
esac
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)} ||
    die "this is no git repository: give the time as SOURCE_DATE_EPOCH (seconds since 1970)"
export SOURCE_DATE_EPOCH LC_ALL=C
umask 022

deb=$(packaging/deb.sh)
version=$(dpkg-deb -f "$deb" Version)
name=mce-relay-$version
out=target/release-files
tmp=$(mktemp -d -p target release.XXXXXX)
trap 'rm -rf "$tmp"' EXIT
files=$tmp/files
mkdir "$files"

dpkg-deb -x "$deb" "$tmp/deb"
cp "$deb" "$files/"
install -m 755 "$tmp/deb/usr/bin/mce-relay" "$files/$name-x86_64-linux"
objcopy --only-keep-debug --compress-debug-sections "${CARGO_TARGET_DIR:-target}/dist/mce-relay" "$files/$name-x86_64-linux.debug"
chmod 644 "$files/$name-x86_64-linux.debug"

if [ "${SBOM:-on}" = on ]; then
    # It writes beside every Cargo.toml of the workspace, so it is given a copy, whose place it then names.
    mkdir "$tmp/copy"
    find . -path ./target -prune -o \( -name Cargo.toml -o -path ./Cargo.lock -o -name '*.rs' \) -print0 | xargs -0 cp --parents -t "$tmp/copy"
    copy=$(realpath "$tmp/copy")
    cargo-cyclonedx cyclonedx --quiet --manifest-path "$copy/cli/Cargo.toml" --format json --spec-version 1.5 \
        --describe binaries --no-build-deps --target x86_64-unknown-linux-gnu
    sed "s,file://$copy/,file:///," "$copy/cli/mce-relay_bin.cdx.json" >"$files/$name-sbom.cdx.json"
    cmp "$copy/Cargo.lock" Cargo.lock || die "Cargo.lock is not what Cargo.toml asks for; \`cargo check\` brings it up to date"
fi
(cd "$files" && sha256sum -- * >SHA256SUMS)
rm -rf "$out"
mv "$files" "$out"
say "$out has:"
(cd "$out" && stat -c '%10s  %n' -- *)
