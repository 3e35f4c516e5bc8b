#!/usr/bin/env bash
# Whether a browser shows the page that `mce-relay report` makes as it is meant: in a headless Chromium, of the events in
# tests/report/events.jsonl and of a hundred thousand. Chromium is an installed one, or Debian's of the package
# chromium-headless-shell, which is unpacked below target/ with all that it needs (170 MB to fetch) and not installed; where
# neither can be had the test is skipped, with the reason. Not part of `make check`, as it fetches.
#
# usage: tests/report.sh      MCE_RELAY_BIN names another program than target/release/mce-relay
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

skip() {
    echo "SKIPPED the report in a browser: $1" >&2
    exit 0
}

command -v python3 >/dev/null || skip 'needs python3'
mce_relay=${MCE_RELAY_BIN:-${CARGO_TARGET_DIR:-target}/release/mce-relay}
[ -x "$mce_relay" ] || { echo "report.sh: $mce_relay is not there; make build" >&2; exit 1; }
store=$PWD/target/tools/chromium
shell=usr/lib/chromium/chromium-headless-shell

# A program that runs Chromium.
a_browser() {
    local name
    for name in chromium-headless-shell chromium chromium-browser google-chrome; do
        if type -P "$name"; then
            return
        fi
    done
    [ -x "$store/run" ] || fetched || return 1
    echo "$store/run"
}

fetched() {
    local conf new deb
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    conf=$(guest-image/foreign.sh "$(dpkg --print-architecture)") || return 1
    echo 'fetching Chromium and what it needs' >&2
    {
        APT_CONFIG=$conf apt-get update -qq &&
            APT_CONFIG=$conf apt-get install -qq -y --no-install-recommends --download-only chromium-headless-shell
    } >&2 || return 1
    new=$store.new.$$
    rm -rf "$store" "$new"
    mkdir -p "$new"
    # apt knows of nothing that is installed here, so all of them are in its cache, and nothing else of a browser's.
    for deb in "$(dirname "$conf")"/cache/archives/*.deb; do
        dpkg-deb -x "$deb" "$new/root" || return 1
    done
    [ -x "$new/root/$shell" ] || return 1
    # The libraries are found where they were unpacked, those in directories of their own, too.
    cat >"$new/run" <<'END_OF_FILE'
#!/bin/bash
root=$(dirname "${BASH_SOURCE[0]}")/root
for lib in "$root"/{,usr/}lib/*-linux-gnu{,/*/}; do
    LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$lib
done
export LD_LIBRARY_PATH FONTCONFIG_PATH=$root/etc/fonts
exec "$root/usr/lib/chromium/chromium-headless-shell" "$@"
END_OF_FILE
    chmod +x "$new/run"
    mv "$new" "$store"
}

chromium=$(a_browser) || skip 'there is no Chromium here, and Debian'\''s could not be fetched (see above)'
"$chromium" --version >&2 || skip "$chromium does not run here"

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
echo '== The report of tests/report/events.jsonl'
"$mce_relay" report --events tests/report/events.jsonl -o "$tmp/report.html"
timeout 300 tests/report/browser.py "$chromium" "$tmp/report.html" "$tmp/report.pdf"
head -c 5 "$tmp/report.pdf" | grep -q '^%PDF-' || { echo 'report.sh: it does not print' >&2; exit 1; }
echo "  printed: $(stat -c %s "$tmp/report.pdf") bytes"

echo '== A report of 100,000 events'
python3 - >"$tmp/many.jsonl" <<'END'
import json

def event(at, name, **properties):
    stamp = {"secs": at // 10**6, "nanos": at % 10**6 * 1000}
    print(json.dumps({"timestamp": stamp, "source": "memory", "event": name, "properties": properties}))

for page in range(25_000):
    gpa, hva, at = hex(page << 13), hex(0x7F0000000000 + (page << 13)), page * 100
    if page == 12345:
        gpa = "0x28f9000"
    event(at, "caught", kind="AO", hva=hva, lsb=12, thread="relay", forged=False)
    event(at + 10, "seen", gpa=gpa, hva=hva, kind="AO", found_by="signal", extent=4096, pages=1)
    event(at + 20, "injected", gpa=gpa, channel="ghes", record=page + 1, pages=1, after_micros=10, forged=False)
    event(at + 30, "acknowledged", gpa=gpa, channel="ghes", record=page + 1, after_micros=20, forged=False)
END
time "$mce_relay" report --events "$tmp/many.jsonl" -o "$tmp/many.html"
[ "$(grep -c '^<tr data-kinds' "$tmp/many.html")" = 25000 ] || { echo 'report.sh: pages are missing' >&2; exit 1; }
echo 'the report works in a browser'
