# howdah: two commands are all a newcomer needs, `make demo` and `make test`.
# Everything slow is kept under ~/.cache/howdah by the hash of its inputs, so that a second clone reuses it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

HOWDAH_CACHE ?= $(HOME)/.cache/howdah
# One target folder for all clones on this machine: foreign crates are compiled once.
export CARGO_TARGET_DIR ?= $(HOWDAH_CACHE)/cargo-target
export CARGO_TERM_COLOR ?= auto
# A fresh clone compiles all that is ours, a fifth faster without what would make a next time faster.
export CARGO_INCREMENTAL ?= 0
# What `make setup` may have had to install itself.
export PATH := $(PATH):$(HOME)/.cargo/bin:$(HOWDAH_CACHE)/go/1.26.8/bin
# The lab that tests and the demo share; another name gives another, independent lab.
export HOWDAH_LAB ?= main

LAB := $(CARGO_TARGET_DIR)/debug/howdah-lab
CARGO_DENY_VERSION := 0.20.2
CARGO_DENY := $(HOWDAH_CACHE)/cargo-tools/cargo-deny-$(CARGO_DENY_VERSION)/bin/cargo-deny

.PHONY: help
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install what the lab needs from Debian (named in tests/lab/packages.txt) and the Rust and Go tools
	@tests/lab/setup.sh

.PHONY: demo
demo: setup lab-binary ## Set everything up and show the main job on a real cluster
	$(LAB) demo

.PHONY: test
test: setup lint test-core test-lab ## Set everything up and run every test

.PHONY: lint
lint: $(CARGO_DENY) ## Formatting, clippy with warnings denied, dependency policy
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo fetch --locked --quiet
	$(CARGO_DENY) --offline check --hide-inclusion-graph bans licenses sources

# Not optimized and not to be debugged: it runs for seconds, and would be compiled for minutes.
$(CARGO_DENY):
	CARGO_PROFILE_DEV_DEBUG=false cargo install --debug --locked --root $(HOWDAH_CACHE)/cargo-tools/cargo-deny-$(CARGO_DENY_VERSION) cargo-deny@$(CARGO_DENY_VERSION)

# Always the whole workspace, and a filter on targets: with `-p` cargo would choose other features for
# foreign crates and compile them a second time.
NO_LAB_TESTS := $(foreach file,$(wildcard */tests/*.rs tests/tidy/tests/*.rs),--test $(basename $(notdir $(file))))

# Of the binaries kubectl-howdah alone is no thin shell around a library, and has tests.
.PHONY: test-core
test-core: ## Tests that need no lab: the pure core, unit tests, the tidy tests
	cargo test --workspace --locked --lib --bin kubectl-howdah $(NO_LAB_TESTS)

.PHONY: test-lab
test-lab: lab-binary ## Tests on real parts: control plane, Ceph, PostgreSQL, virtual-machine nodes
	tests/lab/run-tests.sh

# Coverage of the branches taken, which libFuzzer steers by; stable Rust can give it, sanitizers it cannot. Only what is
# built for a named target is compiled with these flags, so that build scripts still run.
FUZZ_TARGET := x86_64-unknown-linux-gnu
FUZZ_FLAGS := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
	-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Ccodegen-units=1
# How long each of the two targets is fuzzed.
FUZZ_SECONDS ?= 600
# What it has found stays here and is where the next run begins.
FUZZ_FOUND := $(HOWDAH_CACHE)/fuzz

.PHONY: fuzz
fuzz: ## Fuzz review bodies and annotations with libFuzzer, FUZZ_SECONDS (600) each
	for name in reviews annotations; do \
		mkdir -p $(FUZZ_FOUND)/$$name; \
		CARGO_TARGET_DIR=$(HOWDAH_CACHE)/fuzz-target RUSTFLAGS="$(FUZZ_FLAGS)" cargo run --release --locked \
			--target $(FUZZ_TARGET) -p howdah-fuzz --features libfuzzer --bin fuzz-$$name -- \
			-max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 -max_len=65536 -dict=fuzz/words.dict \
			-artifact_prefix=$(FUZZ_FOUND)/$$name- -print_final_stats=1 $(FUZZ_FOUND)/$$name fuzz/corpus/$$name; \
	done

# How long `make soak` runs, beyond the operation that is under way.
export HOWDAH_SOAK_SECONDS ?= 600

.PHONY: soak
soak: setup lab-binary ## Back up and restore by chance, with a scheduler that is killed at random, HOWDAH_SOAK_SECONDS (600) long
	HOWDAH_LAB=soak cargo test --workspace --locked --test soak -- --nocapture
	HOWDAH_LAB=soak $(LAB) down

# The webhook is built as its image builds it. For a quick look: BENCH_FLAGS="--rounds 1 --paced 2000 --flood 2000 --long 10000 --starts 2".
.PHONY: bench-admission
bench-admission: ## Measure the webhook beside a minimal admission server; writes docs/benchmarks/admission.md
	cargo build --release --locked -p howdah-webhook
	cargo build --release --locked -p howdah-bench-admission -p howdah-lab
	$(CARGO_TARGET_DIR)/release/bench-admission $(BENCH_FLAGS)

# A lab of its own, whose ten thousand databases nobody else has to look at.
.PHONY: bench-scale
bench-scale: ## Measure the scheduler over ten thousand databases; writes docs/benchmarks/scale.md
	cargo build --release --locked -p howdah-scheduler
	cargo build --release --locked -p howdah-bench-backup -p howdah-lab
	HOWDAH_LAB=bench $(CARGO_TARGET_DIR)/release/bench-backup scale $(BENCH_FLAGS)
	HOWDAH_LAB=bench $(CARGO_TARGET_DIR)/release/howdah-lab down

.PHONY: bench-backup
bench-backup: ## Measure backups and restores beside bare commands; writes docs/benchmarks/backup.md
	cargo build --release --locked -p howdah-scheduler
	cargo build --release --locked -p howdah-bench-backup -p howdah-lab
	HOWDAH_LAB=bench $(CARGO_TARGET_DIR)/release/bench-backup storage $(BENCH_FLAGS)
	HOWDAH_LAB=bench $(CARGO_TARGET_DIR)/release/howdah-lab down

.PHONY: lab-binary
lab-binary:
	cargo build --workspace --bins --locked

.PHONY: generate
generate: ## Write the generated files (CRDs, rule reference, README table) anew
	HOWDAH_GENERATE=1 cargo test --workspace --locked --test generated

.PHONY: up
up: setup lab-binary ## Bring the lab up with three nodes and howdah in it
	$(LAB) up --nodes 3

.PHONY: down
down: ## Take the lab down; nothing of it stays but the caches
	$(LAB) down

.PHONY: clean
clean: ## Remove the caches of this machine (foreign builds, node trees, images)
	rm -rf $(HOWDAH_CACHE)
