#!/bin/sh
# Called by mmdebstrap with the folder of the unpacked and configured packages: takes away what differs each time.
# Its own files in tmp/ stay: without them its apt would clean up this machine's lists instead of the guest's.
set -eu
rm -f "$1"/etc/ssh/ssh_host_*
rm -f "$1"/var/log/apt/* "$1"/var/log/*.log "$1"/var/cache/ldconfig/aux-cache
