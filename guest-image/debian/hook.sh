#!/bin/sh
# Called by mmdebstrap with the folder of the unpacked and configured packages: takes away what differs each time.
set -eu
rm -f "$1"/etc/ssh/ssh_host_*
rm -f "$1"/var/log/apt/* "$1"/var/log/*.log "$1"/var/cache/ldconfig/aux-cache
rm -rf "$1"/tmp/* "$1"/var/tmp/*
find "$1"/var/lib/apt/lists "$1"/var/cache/apt -type f -delete
