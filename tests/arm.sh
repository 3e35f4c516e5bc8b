#!/usr/bin/env bash
# The component's tests on an emulated aarch64 host (tests/lab/aarch64.sh), cross-built, and at the end what was run and what
# was not. What needs real poison poisons that host's memory. `make arm` calls it; docs/aarch64.md says what it shows.
#
# Exit status: 0 all passed, or that host cannot be had here (which is said); else 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
triple=aarch64-unknown-linux-gnu
log=target/tests/arm.log
mkdir -p target/tests

skip() {
    printf 'SKIPPED the tests on aarch64: %s\n' "$*"
    exit 0
}
available() { [ -d "$(rustc --print target-libdir --target $triple 2>/dev/null)" ]; }
available || timeout 180 rustup target add $triple >/dev/null 2>&1 || true
available || skip "this toolchain has no library for them (rustup target add $triple)"
NEED='aarch64-linux-gnu-gcc:gcc-aarch64-linux-gnu /usr/aarch64-linux-gnu/lib/libc.a:libc6-dev-arm64-cross' tests/lab/setup.sh ||
    skip 'the linker gcc-aarch64-linux-gnu, or what all labs need, could not be installed (see above)'
status=0
tests/lab/aarch64.sh --setup || status=$?
[ "$status" != 77 ] || skip 'qemu-system-aarch64 or a kernel for it cannot be had (see above)'
[ "$status" = 0 ] || exit 1

# Static: that host has no libraries. Feature kvm has nothing in it for that architecture, and the example embed needs it.
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
# By RUSTFLAGS, which would win over those of the target alone; and where the host finds them, and as is read here.
unset CARGO_ENCODED_RUSTFLAGS
export RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static"
export CARGO_TARGET_DIR=$PWD/target CARGO_TERM_COLOR=never CARGO_TERM_QUIET=false
what=(--release --locked -p mce-relay --target $triple --features "forge,internals,serde,seccompiler,vm-memory")
cargo build "${what[@]}" --examples || exit 1 # one of them is run by a test
built=$(cargo test "${what[@]}" --no-run --lib --tests 2>&1)
mapfile -t binaries < <(sed -n 's/^ *Executable .*(\(.*\))$/\1/p' <<<"$built")
[ ${#binaries[@]} != 0 ] || { printf '%s\nthe tests do not build\n' "$built" >&2; exit 1; }

# hwpoison: its tests poison memory, and are ignored elsewhere.
in_lab() {
    printf 'planned: %s\n' "$@"
    # shellcheck disable=SC2016 # expanded inside
    tests/lab/aarch64.sh sh -c 'worst=0
        for binary; do
            echo "binary: $binary"
            case $binary in */hwpoison-*) also=--include-ignored ;; *) also= ;; esac
            "$binary" $also || worst=$?
        done
        exit $worst' sh "$@"
}
in_lab "${binaries[@]}" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
report=$(awk -f tests/report.awk "$log")
count() { awk -v what="$1" '$1 == what { n += $2 } END { print n + 0 }' <<<"$report"; }
failed=$(grep -c '^failed' <<<"$report")
sed -n 's/^failed\t/failed: /p; s/^skip\t/skipped: /p' <<<"$report"
echo 'skipped: the examples in the documentation, which rustdoc runs on the machine that builds; feature kvm and the example'
echo 'skipped: embed, which are of x86-64; all scenarios: there is no VMM here for that architecture'
echo "$(count passed) passed, $failed failed, $(count skipped) skipped on aarch64 (exit status $status)"
[ "$status" = 0 ] && [ "$failed" = 0 ] && [ "$(count passed)" != 0 ]
