#!/usr/bin/env bash
# Prints the path of a configuration with which apt knows packages that this machine does not take, and nothing of this machine:
# its lists, its cache and its list of what is installed are below target/. For APT_CONFIG.
#
# usage: foreign.sh ARCHITECTURE [SUITE]
#   ARCHITECTURE   by Debian's name, arm64 say: this machine's package sources for it
#   SUITE          of Debian, trixie-backports say, from the mirror that this machine has Debian from
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ${1:-} =~ ^[a-z0-9]+$ && ${2:-} =~ ^[a-z0-9-]*$ && $# -le 2 ]] || { echo "usage: foreign.sh ARCHITECTURE [SUITE]" >&2; exit 1; }
dir=$top/target/kernels/apt-$1${2:+-$2}
if [ ! -e "$dir/apt.conf" ]; then
    mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
    : >"$dir/status"
    new=$dir/new.$$
    # The user _apt, who else would fetch, cannot write here.
    cat >"$new" <<END_OF_FILE
Dir::State "$dir/state";
Dir::State::status "$dir/status";
Dir::Cache "$dir/cache";
APT::Architecture "$1";
APT::Architectures { "$1"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
END_OF_FILE
    if [ -n "${2:-}" ]; then
        # shellcheck disable=SC2016 # apt's own variables
        mirror=$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI) $(COMPONENT) $(CODENAME)' 'Created-By: Packages' |
            awk '$1 == "Debian" && $3 == "main" && $4 !~ /-security$/ { print $2; exit }') || true
        if [ -z "$mirror" ]; then
            echo "foreign.sh: this machine's package sources name no mirror of Debian, or apt has no lists yet (apt-get update)" >&2
            exit 1
        fi
        keyring=/usr/share/keyrings/debian-archive-keyring.gpg
        signed=
        [ ! -e "$keyring" ] || signed="[signed-by=$keyring] "
        printf 'deb %s%s %s main\n' "$signed" "$mirror" "$2" >"$dir/sources.list"
        printf 'Dir::Etc::sourcelist "%s";\nDir::Etc::sourceparts "-";\n' "$dir/sources.list" >>"$new"
    fi
    mv "$new" "$dir/apt.conf"
fi
printf '%s\n' "$dir/apt.conf"
