#!/usr/bin/env bash
# Requests made from docs/openapi.json, good ones and bad ones, against a VM that runs: every answer has
# to be one that the document has, and the VM has to run on. By schemathesis, which is put below target/.
# usage: api.sh [CASES-PER-REQUEST]
# Its last line counts as a test runner's does.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
cases=${1:-40} venv=target/venv

skip() {
    echo "SKIPPED fuzzing of the API: $*"
    echo 'test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out'
    exit 0
}
fail() {
    echo "fuzzing of the API: $*" >&2
    echo 'test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out'
    exit 1
}
[ -w /dev/kvm ] || skip 'needs /dev/kvm'
if ! [ -x $venv/bin/schemathesis ]; then
    python3 -m venv $venv >/dev/null 2>&1 || skip 'needs python3 with venv (apt-get install python3-venv)'
    $venv/bin/pip install --quiet --disable-pip-version-check 'schemathesis>=4,<5' ||
        skip 'schemathesis cannot be installed (pip)'
fi

dir=$(mktemp -d "${TMPDIR:-/tmp}/mce-relay-fuzz.XXXXXX")
vm='' proxy=''
leave() {
    kill $vm $proxy 2>/dev/null
    wait 2>/dev/null
    rm -rf "$dir"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

target/release/tiny "$dir/kernel" || fail 'there is no target/release/tiny; run make build'
target/release/mce-relay run --kernel "$dir/kernel" --memory 64M --cpus 2 --serial off \
    --api-socket "path=$dir/api" --on-undeliverable pause >"$dir/log" 2>&1 &
vm=$!
# Where the VMM's threads stand, and what it has said.
look() {
    for thread in "/proc/$vm/task"/*; do
        (cd "$thread" && echo "$(cat comm) $(cut -d ' ' -f 3 stat) wchan $(cat wchan) syscall $(cat syscall)" && cat stack)
    done 2>/dev/null
    cat "$dir/log"
}
for _ in {1..600}; do [ -S "$dir/api" ] && break; sleep 0.05; done
[ -S "$dir/api" ] || { look; fail 'the VM did not start'; }
# Below the range that the kernel takes ports from by itself.
port=$((20000 + RANDOM % 10000))
python3 tests/fuzz/proxy.py $port "$dir/api" &
proxy=$!
for _ in {1..100}; do (: >/dev/tcp/127.0.0.1/$port) 2>/dev/null && break; sleep 0.05; done
files() { find "/proc/$vm/fd" 2>/dev/null | wc -l; }
before=$(files)

# Not: what ends the VM or its guest, and a stream that does not end, which the proxy has end. Its guest is a loop of
# two instructions, so nothing of it is lost by the rest.
top=$PWD
# It leaves its notes where it is run.
(cd "$dir" && "$top/$venv/bin/schemathesis" --config-file "$top/tests/fuzz/schemathesis.toml" \
    run "$top/docs/openapi.json" --url "http://127.0.0.1:$port" --max-examples "$cases" \
    --exclude-path /api/v1/vm.shutdown --exclude-path /api/v1/vm.reset --workers 1 \
    --request-timeout 30 --generation-database none --no-color) \
    >"$dir/out" 2>&1
status=$?
cat "$dir/out"
kill -0 $vm 2>/dev/null || { cat "$dir/log"; fail 'the VM has ended'; }
after=$(files)
# The proxy's last connections may be there still.
[ "$after" -le $((before + 4)) ] || fail "the VM had $before open files and has $after"
[ $status = 0 ] || { look | tail -60; fail "schemathesis ended with status $status"; }
echo "the VM runs on, with $after open files ($before before)"
echo 'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out'
