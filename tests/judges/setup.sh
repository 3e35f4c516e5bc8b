#!/usr/bin/env bash
# Gets the tools that judge a dump of a guest's memory: crash and makedumpfile as packages, and drgn in an
# environment of its own below target/; and qemu-img and qemu-io, which judge images of disks. What cannot be had is said; the test that wants it says so again.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
venv=target/venv-drgn

missing() { echo "SKIPPED as a judge: ${1%%:*} ($2)" >&2; }
for tool in crash makedumpfile qemu-img:qemu-utils; do
    NEED=$tool tests/lab/setup.sh || missing "$tool" 'its package cannot be installed, see above'
done
if ! $venv/bin/python -c 'import drgn' 2>/dev/null; then
    { python3 -m venv $venv >/dev/null && $venv/bin/pip install --quiet --disable-pip-version-check drgn==0.3.0; } ||
        missing drgn 'it cannot be installed by pip, see above'
fi
exit 0
