# Everything is kept below target/. `make` without a target says what there is.
SHELL := /bin/bash
CARGO ?= cargo
# Written to the terminal or a log while something takes its time.
SAY = @printf '\n==== %s\n' >&2

help:
	@echo 'make run            boot a guest in the lab, poison a page of it, watch the relay'
	@echo '                    VENDOR=intel|amd; GUEST=debian boots Debian; NATIVE=1 uses this host, and says what that does'
	@echo 'make test           all three tiers of tests'
	@echo 'make lab            a shell in the lab;  make lab CMD="…"  runs a command there'
	@echo '                    HOST=intel CMD="…" runs it on an Intel host, with what LAB_FILES names; HOST=aarch64 CMD="…" on an Arm one'
	@echo 'make soak           hours: large bursts, random poison and touches (SOAK_MINUTES, 10; SOAK_SEED), then'
	@echo '                    the scenarios over and over (SOAK_ROUNDS, 10)'
	@echo 'make intel          tier 2 and the scenarios on the emulated Intel host: an hour (TESTS="ao::amd_two_vcpus …")'
	@echo 'make matrix         a handful of scenarios on each host kernel under each guest kernel, into docs/kernels.md'
	@echo 'make arm            the component on an emulated aarch64 host: its tests, with real poison'
	@echo 'make bench          figures beside QEMU and beside the physical floor (FIGURES="criterion boot …"): target/bench/'
	@echo 'make fuzz           each fuzz target for a minute (FUZZ_SECONDS, 60; TARGETS="siginfo intervals …")'
	@echo 'make peer           bursts of failures on QEMU, for comparison (PEER_BURSTS, VENDOR=amd|intel)'
	@echo 'make build          target/release/mce-relay'
	@echo 'make dist           target/dist/mce-relay: the same for other machines, static and small'
	@echo 'make deb            target/deb/mce-relay_VERSION_amd64.deb: that, and a unit of systemd that runs VMs'
	@echo 'make release        target/release-files/: the program, the package, the list of crates (SBOM=off: without), SHA256SUMS'
	@echo 'make guest-image    the guest (KERNEL=package or file)'
	@echo 'make guest-image-debian  a guest with systemd, rasdaemon, sshd, stress-ng and fio (KERNEL=package)'
	@echo 'make emulators      the lab under each QEMU that it is meant for (SUITES="trixie-backports ...")'
	@echo 'make drawing        docs/way-of-one-error.svg, from the text beside it'
	@echo 'make check          formatting, lints, documentation, portability, packing, the unit of systemd, licences'
	@echo 'make deb-check      the package: what is in it, that it installs in a chroot, and its unit under a systemd of its own'
	@echo 'make tools          cargo-deny for make check, below target/tools'
	@echo 'make clean          remove target/'

setup:
	@tests/lab/setup.sh

build:
	$(SAY) 'building mce-relay and its tests'
	$(CARGO) build --release --locked --workspace --exclude mce-relay-bench --bins --tests --examples

# Static, so that the C library's part is what is used of it; relocations are packed (DT_RELR); what a running VM does
# not use is put aside (cli/dist.ld, whose names are those of v0 mangling).
dist:
	$(SAY) 'building mce-relay, static and small'
	RUSTFLAGS="$$RUSTFLAGS -C symbol-mangling-version=v0" \
		$(CARGO) rustc --profile dist --locked -p mce-relay-cli --bin mce-relay -- \
		-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs -C link-arg=-Wl,-T,$(CURDIR)/cli/dist.ld

deb: dist
	$(SAY) 'Debian package'
	packaging/deb.sh

deb-check: dist
	$(SAY) 'the Debian package, in a chroot and under systemd'
	tests/deb.sh

# Without the tool for the list of crates release.sh says what to do.
release: dist
	@[ "$(or $(SBOM),on)" = off ] || $(MAKE) target/tools/bin/cargo-cyclonedx || true
	$(SAY) 'files of a release'
	SBOM=$(or $(SBOM),on) packaging/release.sh

guest-image: setup
	$(SAY) 'guest image'
	guest-image/build.sh

# A minute, most of it for Debian's packages, which are kept; nothing else needs it.
guest-image-debian:
	$(SAY) 'Debian guest'
	guest-image/debian.sh

lab-image: setup
	$(SAY) 'lab image'
	tests/lab/build.sh

# Said before anything is built.
ifneq ($(filter run,$(MAKECMDGOALS)),)
ifeq ($(filter intel amd,$(or $(VENDOR),intel)),)
$(error VENDOR=$(VENDOR) is not a vendor; expected intel or amd)
endif
endif
ifneq ($(filter run,$(MAKECMDGOALS)),)
ifeq ($(filter small debian,$(or $(GUEST),small)),)
$(error GUEST=$(GUEST) is not a guest; expected small or debian)
endif
endif
ifeq ($(GUEST),debian)
run: guest-image-debian
endif
ifeq ($(NATIVE),1)
run: build guest-image
	MCE_RELAY_NATIVE=1 MCE_RELAY_VENDOR=$(or $(VENDOR),intel) MCE_RELAY_GUEST=$(or $(GUEST),small) target/release/show
else
run: build guest-image lab-image
	MCE_RELAY_VENDOR=$(or $(VENDOR),intel) MCE_RELAY_GUEST=$(or $(GUEST),small) tests/lab/run.sh target/release/hold target/release/show
endif

# What reads dumps and images of disks; not having it fails nothing.
judges: setup
	@tests/judges/setup.sh
	@tests/lab/intel.sh --setup || true

test: build guest-image lab-image judges
	NATIVE=$(NATIVE) tests/run.sh

soak: build guest-image lab-image
	tests/soak.sh

bench: build dist guest-image lab-image
	$(SAY) 'building the benchmarks'
	$(CARGO) build --release --locked -p mce-relay-bench
	@NEED=valgrind tests/lab/setup.sh
	FIGURES='$(FIGURES)' bench/run.sh

intel: build guest-image
	tests/intel.sh $(TESTS)

matrix: build
	tests/matrix.sh

# Cross-built, so nothing of `build` is needed.
arm:
	tests/arm.sh

fuzz:
	@NEED=g++ tests/lab/setup.sh # libFuzzer is C++
	tests/fuzz/run.sh $(TARGETS)

# The line beside ours: the same bursts on the newest QEMU that Debian offers. Not part of the tests.
PEER_BURSTS ?= 8 64 512 4096
peer: build guest-image lab-image
	$(SAY) 'bursts of real memory failures on QEMU'
	qemu=$$(tests/peer/qemu.sh) && LAB_TIMEOUT=$${LAB_TIMEOUT:-3600} tests/lab/run.sh \
		target/release/hold target/release/peer "$$qemu" $(or $(VENDOR),amd) $(PEER_BURSTS)

emulators: build guest-image lab-image
	tests/lab/emulators.sh $(SUITES)

# CMD is one line for a shell, so that pipes and quotes in it mean what they say.
ifneq ($(filter lab,$(MAKECMDGOALS)),)
ifeq ($(origin HOST),command line)
ifeq ($(filter intel amd aarch64,$(HOST)),)
$(error HOST=$(HOST) is not a host of the lab; expected intel, amd or aarch64)
endif
ifneq ($(filter intel aarch64,$(HOST)),)
ifeq ($(CMD),)
$(error make lab HOST=$(HOST) wants CMD='...': there is no shell on that host)
endif
endif
endif
endif
ifeq ($(origin HOST) $(HOST),command line intel)
lab: build guest-image
	@tests/lab/intel.sh target/release/hold sh -c "$$CMD"
else ifeq ($(origin HOST) $(HOST),command line aarch64)
lab:
	@tests/lab/aarch64.sh sh -c "$$CMD"
else
lab: lab-image
	@tests/lab/run.sh $(if $(CMD),sh -c "$$CMD")
endif
export CMD

check:
	$(CARGO) fmt --all --check
	rustfmt --edition 2024 --check tests/fuzz/targets/*.rs
	$(CARGO) clippy --release --locked --workspace --all-targets --all-features -- -D warnings
	# As those have it who take none of its features.
	$(CARGO) clippy --release --locked -p mce-relay -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --release --locked --workspace --no-deps
	# They compile; the path, which is never linked, spares the build of the C++ runtime.
	CUSTOM_LIBFUZZER_PATH=/none/libfuzzer.a CARGO_TARGET_DIR=target/fuzz $(CARGO) check --locked --manifest-path tests/fuzz/Cargo.toml
	tests/portable.sh
	tests/layers.py
	tests/contrib.sh
	tests/service.sh
	# Each builds from what is packed of it, beside the others as they are packed (cargo 1.90).
	$(CARGO) package --quiet --locked --allow-dirty -p mce-relay -p mce-relay-vmm -p mce-relay-cli
	# It looks at the crates of all platforms, of which a build fetches only its own.
	@PATH="$$PWD/target/tools/bin:$$PATH"; \
	if $(CARGO) deny --version >/dev/null 2>&1; then \
		$(CARGO) fetch --locked --quiet; \
		$(CARGO) deny --offline check bans licenses sources; \
	else \
		echo 'SKIPPED licences and duplicate crates: cargo-deny is not installed (make tools)'; \
	fi

# What `make check` and `make release` need and a toolchain does not bring. They work for a second, so they are not
# optimised, which halves the time to build them.
TOOL_cargo-deny := 0.20.2
TOOL_cargo-cyclonedx := 0.5.9
tools: target/tools/bin/cargo-deny
target/tools/bin/cargo-%:
	$(SAY) 'building cargo-$*'
	mkdir -p target/tools
	CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_DEBUG=0 \
		CARGO_PROFILE_RELEASE_CODEGEN_UNITS=256 \
		$(CARGO) install cargo-$* --quiet --locked --version $(TOOL_cargo-$*) --root target/tools

# The text has the positions, so neato only draws. Without its version in the picture, a newer one changes less of it.
drawing:
	@command -v neato >/dev/null || { echo 'make drawing needs neato: apt-get install graphviz' >&2; exit 1; }
	neato -n -Tsvg docs/way-of-one-error.dot -o docs/way-of-one-error.svg
	sed -i '/^<!-- Generated by/,/-->/d' docs/way-of-one-error.svg

clean:
	rm -rf target

.PHONY: help setup judges build dist deb deb-check release guest-image guest-image-debian lab-image run test soak intel matrix arm bench fuzz peer lab emulators drawing check tools clean
