#!/usr/bin/env bash
# Runs the tests that stand on real parts, cheapest layer first, so that a broken low layer is seen early.
# A lab that cannot start is a failure, never a skip. Whatever happens, the lab is taken down at the end.
set -euo pipefail

: "${CARGO_TARGET_DIR:?run this by make test-lab}"
# A lab of the tests' own: `make test` neither uses nor disturbs the one of `make demo`.
export HOWDAH_LAB=test
lab=$CARGO_TARGET_DIR/debug/howdah-lab
# Emulated nodes and two cores: more parallel tests only wait for each other.
threads=2

finish() {
    status=$?
    if [ "$status" != 0 ]; then
        "$lab" status >&2 || true
    fi
    "$lab" down >&2 || status=1
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

run() {
    printf '\n== %s tests\n' "$1" >&2
    # The whole workspace and a filter, as in the Makefile: other features would compile foreign crates again.
    cargo test --workspace --locked "${@:2}"
}

# What a killed run left would be taken for this one's.
"$lab" down
run "API level (control plane only)" --test api -- --test-threads="$threads"
# The API tests make storage classes of their own under Rook's names; Rook's are immutable.
"$lab" down
run "storage level (Ceph and PostgreSQL)" --test storage -- --test-threads="$threads"
"$lab" up --nodes 3
run "cluster level (three nodes, howdah installed)" --test cluster -- --test-threads="$threads"
"$lab" down
run "the lab itself" --test lab -- --test-threads=1
