#!/usr/bin/env bash
# Prints the path of a configuration with which apt knows this machine's package sources for another architecture, and
# nothing of this machine: its lists, its cache and its list of what is installed are below target/. For APT_CONFIG.
#
# usage: foreign.sh ARCHITECTURE      by Debian's name, arm64 say
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ${1:-} =~ ^[a-z0-9]+$ ]] || { echo "usage: foreign.sh ARCHITECTURE" >&2; exit 1; }
dir=$top/target/kernels/apt-$1
if [ ! -e "$dir/apt.conf" ]; then
    mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
    : >"$dir/status"
    # The user _apt, who else would fetch, cannot write here.
    cat >"$dir/new.$$" <<END_OF_FILE
Dir::State "$dir/state";
Dir::State::status "$dir/status";
Dir::Cache "$dir/cache";
APT::Architecture "$1";
APT::Architectures { "$1"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
END_OF_FILE
    mv "$dir/new.$$" "$dir/apt.conf"
fi
printf '%s\n' "$dir/apt.conf"
