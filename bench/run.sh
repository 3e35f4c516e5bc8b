#!/usr/bin/env bash
# Measures us beside others and writes target/bench/report.md. FIGURES names what is measured, all without it:
#   counted    instructions, by callgrind
#   criterion  what is inside a process
#   delivery exits scan ledger    on this machine's KVM and memory
#   api        deliveries while clients ask, on this machine's KVM
#   slowed     the component built without optimisation, which has to show
#   boot touch burst              whole guests in the lab, beside QEMU
#   disks      a Debian guest's reads in the lab, beside devices without the guard and QEMU's
# What was measured before and is not now stays in the report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=target/bench raw=target/bench/raw
mkdir -p $raw
bin=target/release
all='counted criterion slowed delivery exits scan ledger api boot touch burst disks'
figures=${FIGURES:-$all}
for figure in $figures; do
    case " $all " in
    *" $figure "*) ;;
    *) echo "bench: there is no figure $figure; expected of: $all" >&2; exit 2 ;;
    esac
done
has() { case " $figures " in *" $1 "*) ;; *) return 1 ;; esac; }
of() { # those of the named figures that are wanted
    local one
    for one; do if has "$one"; then printf '%s\n' "$one"; fi; done
}
say() { printf '\n==== bench: %s\n' "$*" >&2; }

say 'the judge of what follows'
cargo test --release --locked --quiet -p mce-relay-bench --lib >&2

{
    printf '%s, %s processors; Linux %s; ' "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)" "$(nproc)" "$(uname -r)"
    rustc --version
} >$raw/machine

count() { # program what to
    local only=()
    [ "$2" != handler ] || only=(--collect-atstart=no '--toggle-collect=*shown_to_the_relay*')
    # As many rounds as report.rs divides by.
    valgrind -q --tool=callgrind --callgrind-out-file="$3" "${only[@]}" "$1" "$2" 100000
}
if has counted; then
    say 'instructions, by callgrind'
    for what in empty deliver handler; do
        count $bin/counted $what $raw/$what.callgrind
    done
fi
if has criterion; then
    say 'inside a process'
    cargo bench --locked --quiet -p mce-relay-bench --bench translation --bench delivery --bench guard -- --noplot >&2
    rm -rf $raw/criterion
    cp -r target/criterion $raw/criterion
fi
if has slowed; then
    say 'the component built without optimisation'
    slow=(--locked --quiet -p mce-relay-bench --target-dir target/slowed --config 'profile.release.package.mce-relay.opt-level=0')
    cargo build --release "${slow[@]}" --bin counted
    mkdir -p $raw/slowed
    count target/slowed/release/counted handler $raw/slowed/handler.callgrind
    CRITERION_HOME=$PWD/target/slowed/criterion cargo bench "${slow[@]}" \
        --config 'profile.bench.package.mce-relay.opt-level=0' \
        --bench delivery -- --noplot 'decisions/AR by LMCE/1$' >&2
    rm -rf $raw/slowed/criterion
    cp -r target/slowed/criterion $raw/slowed/criterion
fi
mapfile -t here < <(of delivery exits scan ledger)
if [ ${#here[@]} != 0 ]; then
    say 'on this machine'
    $bin/here $raw/here.json "${here[@]}"
fi
if has api; then
    say 'deliveries while clients ask'
    $bin/under_load $raw/under_load.json
fi
mapfile -t beside < <(of boot touch burst)
if [ ${#beside[@]} != 0 ]; then
    say 'whole guests, in the lab'
    qemu=$(tests/peer/qemu.sh)
    LAB_TIMEOUT=${LAB_TIMEOUT:-1800} tests/lab/run.sh $bin/hold env MCE_RELAY_BIN=target/dist/mce-relay $bin/beside "$qemu" "${beside[@]}"
    cp target/lab/out/beside.json $raw/
    if has burst; then
        LAB_TIMEOUT=${LAB_TIMEOUT:-1800} tests/lab/run.sh $bin/hold $bin/peer "$qemu" amd 512
        cp target/lab/out/peer.json $raw/
    fi
fi
if has disks; then
    say 'what a Debian guest reads from its disk'
    guest-image/debian.sh
    RUSTFLAGS='--cfg mce_relay_unguarded' cargo build --release --locked --quiet --target-dir target/unguarded --bin mce-relay
    qemu=$(tests/peer/qemu.sh)
    LAB_TIMEOUT=${LAB_TIMEOUT:-1800} tests/lab/run.sh $bin/hold $bin/disks "$qemu" target/unguarded/release/mce-relay
    cp target/lab/out/disks.json $raw/
fi
$bin/report $out
