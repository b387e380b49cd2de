#!/usr/bin/env bash
# Runs the tests that stand on real parts: those without nodes, cheapest layer first, so that a broken low layer is seen early,
# and beside them those with nodes.
# A lab that cannot start is a failure, never a skip. Whatever happens, the lab is taken down at the end.
set -euo pipefail

: "${CARGO_TARGET_DIR:?run this by make test-lab}"
# A lab of the tests' own: `make test` neither uses nor disturbs the one of `make demo`.
export HOWDAH_LAB=test
lab=$CARGO_TARGET_DIR/debug/howdah-lab
# Of the levels that need nodes: they wait for drains, leases and schedules, and for what breaks to be noticed.
cluster_threads=6
nodes_threads=2
# Tests of the API level wait more than they work: for a certificate to be renewed, for a client that is too slow.
api_threads=4
# Tests of the storage level that need a scheduler to themselves would wait for each other in one lab. Three labs and two
# tests for each keep two processors busy.
export HOWDAH_LABS=3
# The one that has nodes.
nodes_lab=$HOWDAH_LAB-nodes
labs="$HOWDAH_LAB $HOWDAH_LAB-2 $HOWDAH_LAB-3 $nodes_lab"

# All that is up; what a killed run left would be taken for this one's.
down() {
    local result=0
    for name in $labs; do
        HOWDAH_LAB=$name "$lab" down >&2 || result=1
    done
    return "$result"
}

# What runs beside the tests in the foreground: the leader of its process group, and what it says.
beside=
beside_log=$(mktemp)

start_beside() {
    # Under job control it has a process group of its own, which can be ended as a whole, and does not ignore SIGINT, which
    # tests of the lab send.
    set -m
    # That it failed is said at once, by a stream that nothing it starts gets hold of.
    (
        trap '[ "$?" = 0 ] || printf "\n== %s: failed; what failed is shown when the rest has ended\n" "$*" >&3' EXIT
        ("$@") 3>&-
    ) 3>&2 >"$beside_log" 2>&1 &
    beside=$!
    set +m
}

join_beside() {
    local result=0
    wait "$beside" || result=$?
    beside=
    cat "$beside_log" >&2
    return "$result"
}

finish() {
    status=$?
    if [ -n "$beside" ]; then
        # It may have ended by itself, which is as good.
        kill -- "-$beside" 2>/dev/null || true
        wait "$beside" || true
        cat "$beside_log" >&2
    fi
    rm -f "$beside_log"
    if [ "$status" != 0 ]; then
        for name in $labs; do
            HOWDAH_LAB=$name "$lab" status >&2 || true
        done
    fi
    down || status=1
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

run() {
    printf '\n== %s tests\n' "$1" >&2
    # The whole workspace and a filter, as in the Makefile: other features would compile foreign crates again.
    cargo test --workspace --locked "${@:2}"
}

# All that needs nodes, in a lab of its own.
nodes_levels() {
    export HOWDAH_LAB=$nodes_lab
    # What the nodes are made of takes minutes to compile where it is not in the cache, and gets the processor time that tests
    # leave: they have limits, and it has none.
    chrt --idle 0 "$lab" build
    "$lab" up --nodes 2
    run "cluster level (two nodes, howdah installed)" --test cluster -- --test-threads="$cluster_threads"
    # These break nodes, so nothing else may use them meanwhile. They bring up a third one.
    run "broken nodes" --test nodes -- --test-threads="$nodes_threads"
    "$lab" down
    run "the lab itself" --test lab -- --test-threads=1
}

down
# Each level leaves processor time, the higher ones most of all. They are told of when they have ended.
start_beside nodes_levels
run "API level (control plane only)" --test api -- --test-threads="$api_threads"
# The API tests make storage classes of their own under Rook's names; Rook's are immutable.
"$lab" down
run "storage level (Ceph and PostgreSQL)" --test storage -- --test-threads=$((2 * HOWDAH_LABS))
printf '\n== what needs nodes, tested meanwhile\n' >&2
join_beside
