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
mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial" "$dir/parts" "$dir/none"
[ -e "$dir/status" ] || : >"$dir/status"
new=$dir/new.$$
# apt reads this machine's fragments behind the file of APT_CONFIG, so ours is a fragment, too, and the last one: how to reach
# a mirror is theirs to say, and nothing else. The user _apt, who else would fetch, cannot write here.
find "$dir/parts" -type l -delete
for part in /etc/apt/apt.conf.d/*; do
    [ ! -f "$part" ] || ln -sf "$part" "$dir/parts/"
done
cat >"$new" <<END_OF_FILE
#clear APT::Architectures;
#clear APT::NeverAutoRemove;
Dir::State "$dir/state";
Dir::State::status "$dir/status";
Dir::Cache "$dir/cache";
Dir::Etc::preferences "$dir/none/preferences";
Dir::Etc::preferencesparts "$dir/none";
APT::Architecture "$1";
APT::Architectures { "$1"; };
APT::Default-Release "";
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
    printf 'deb %s%s %s main\n' "$signed" "$mirror" "$2" >"$dir/sources.list.new.$$"
    cmp -s "$dir/sources.list.new.$$" "$dir/sources.list" || cp "$dir/sources.list.new.$$" "$dir/sources.list"
    rm "$dir/sources.list.new.$$"
    printf 'Dir::Etc::sourcelist "%s";\nDir::Etc::sourceparts "%s";\n' "$dir/sources.list" "$dir/none" >>"$new"
fi
mv "$new" "$dir/parts/zz-foreign"
printf 'Dir::Etc::parts "%s";\n' "$dir/parts" >"$new"
mv "$new" "$dir/apt.conf"
printf '%s\n' "$dir/apt.conf"
