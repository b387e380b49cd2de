#!/bin/bash
# Makes the data directory on the first start, as the official image does, and becomes PostgreSQL.
# Read: POSTGRES_PASSWORD (or POSTGRES_HOST_AUTH_METHOD=trust), POSTGRES_USER, POSTGRES_DB,
# POSTGRES_INITDB_ARGS, POSTGRES_INITDB_WALDIR, PGDATA; each also as NAME_FILE, except the last two.
# Files *.sh, *.sql and *.sql.gz in /docker-entrypoint-initdb.d run once after the first start.
set -Eeuo pipefail
shopt -s nullglob

fail() {
    echo "docker-entrypoint: $*" >&2
    exit 1
}

# Sets NAME from NAME_FILE or to a default.
from_file() {
    local name=$1 file=$1_FILE default=${2:-}
    if [ -n "${!name:-}" ] && [ -n "${!file:-}" ]; then
        fail "set $name or $file, not both"
    elif [ -n "${!file:-}" ]; then
        export "$name"="$(<"${!file}")"
    else
        export "$name"="${!name:-$default}"
    fi
    unset "$file"
}

# The first start listens on the socket alone, so nobody sees a database that is half made.
initialise() {
    from_file POSTGRES_PASSWORD
    from_file POSTGRES_USER postgres
    from_file POSTGRES_DB "$POSTGRES_USER"
    from_file POSTGRES_INITDB_ARGS
    local method=${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}
    if [ -z "$POSTGRES_PASSWORD" ] && [ "$method" != trust ]; then
        fail "set POSTGRES_PASSWORD, or POSTGRES_HOST_AUTH_METHOD=trust to let anybody in"
    fi
    local arguments=(--username="$POSTGRES_USER")
    [ -z "${POSTGRES_INITDB_WALDIR:-}" ] || arguments+=(--waldir="$POSTGRES_INITDB_WALDIR")
    # The password goes through a pipe and never lies in a file. Evaluated, so that quotes in
    # POSTGRES_INITDB_ARGS mean what they look like.
    if [ -n "$POSTGRES_PASSWORD" ]; then
        eval "initdb \"\${arguments[@]}\" --pwfile=<(printf '%s\n' \"\$POSTGRES_PASSWORD\") $POSTGRES_INITDB_ARGS"
    else
        eval "initdb \"\${arguments[@]}\" $POSTGRES_INITDB_ARGS"
    fi
    printf '\nhost all all all %s\n' "$method" >>"$PGDATA/pg_hba.conf"

    pg_ctl -D "$PGDATA" -o "-c listen_addresses='' -p ${PGPORT:-5432}" -w -t 300 start
    export PGPASSWORD=$POSTGRES_PASSWORD
    local sql=(psql -v ON_ERROR_STOP=1 --no-psqlrc --username "$POSTGRES_USER" --no-password)
    if [ "$POSTGRES_DB" != postgres ]; then
        "${sql[@]}" --dbname postgres --set db="$POSTGRES_DB" <<<'CREATE DATABASE :"db";'
    fi
    local file
    for file in /docker-entrypoint-initdb.d/*; do
        echo "docker-entrypoint: running $file"
        case "$file" in
        *.sh) if [ -x "$file" ]; then "$file"; else . "$file"; fi ;;
        *.sql) "${sql[@]}" --dbname "$POSTGRES_DB" -f "$file" ;;
        *.sql.gz) gunzip -c "$file" | "${sql[@]}" --dbname "$POSTGRES_DB" ;;
        *) echo "docker-entrypoint: ignoring $file" ;;
        esac
    done
    pg_ctl -D "$PGDATA" -m fast -w stop
    unset PGPASSWORD
    echo "docker-entrypoint: the database is ready for its first real start"
}

# As in the official image, a leading option is for postgres.
if [ "${1:0:1}" = - ]; then
    set -- postgres "$@"
fi
if [ "$1" != postgres ]; then
    exec "$@"
fi

if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA"
    chmod 00700 "$PGDATA" || true
    find "$PGDATA" \! -user postgres -exec chown postgres '{}' +
    chmod 03775 /var/run/postgresql || true
    exec setpriv --reuid=postgres --regid=postgres --init-groups -- "${BASH_SOURCE[0]}" "$@"
fi

mkdir -p "$PGDATA"
chmod 00700 "$PGDATA" || true
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    initialise
fi
exec "$@"
