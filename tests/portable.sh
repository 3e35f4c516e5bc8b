#!/usr/bin/env bash
# Whether the component and its tests build for another architecture (tests/arm.sh runs them there), and the component with
# the oldest compiler that Cargo.toml states.
# rustup is asked for what is missing; where it is not to be had the check is skipped, with a word.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
triple=aarch64-unknown-linux-gnu
oldest=$(sed -n 's/^rust-version = "\(.*\)"/\1.0/p' Cargo.toml)

available() { [ -d "$(rustc --print target-libdir --target $triple 2>/dev/null)" ]; }
if ! available; then
    echo "asking rustup for the library of $triple" >&2
    timeout 180 rustup target add $triple >/dev/null 2>&1 || true
fi
if available; then
    cargo check --locked --quiet -p mce-relay --all-features --target $triple
    # Feature kvm has nothing in it there, and the example embed needs it.
    cargo clippy --locked --quiet -p mce-relay --features forge,internals,serde,seccompiler,vm-memory \
        --lib --tests --examples --target $triple -- -D warnings
    echo 'the component builds for aarch64, and so do its tests'
else
    echo "SKIPPED the build for aarch64: this toolchain has no library for it (rustup target add $triple)" >&2
fi

installed() { rustup run "$oldest" rustc --version >/dev/null 2>&1; }
if ! installed; then
    echo "asking rustup for Rust $oldest" >&2
    timeout 180 rustup toolchain install "$oldest" --profile minimal >/dev/null 2>&1 || true
fi
if installed; then
    # A directory of its own: every compiler has its own artefacts.
    rustup run "$oldest" cargo check --locked --quiet -p mce-relay --all-features --target-dir target/oldest
    echo "the component builds with Rust $oldest"
else
    echo "SKIPPED the build with Rust $oldest: it is not installed (rustup toolchain install $oldest)" >&2
fi
