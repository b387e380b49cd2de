# Runs in the pod of a restore drill, in the database's own image: starts PostgreSQL on the clone of a backup, follows its
# recovery to the end, reads everything, and says what it found as one line of JSON. POSIX sh: images are Debian and Alpine.
# Whatever is not PostgreSQL's word on the data ends with an exit code instead, and says nothing of the backup.
set -eu
report=${HOWDAH_REPORT:-/dev/termination-log}

give_up() {
    printf '%s\n' "$1" >"$report"
    exit 1
}

# Where the image says, or where a data directory is on the volume: some images tell only their own entrypoint.
for PGDATA in "${PGDATA:-/nowhere}" "$HOWDAH_MOUNT" "$HOWDAH_MOUNT"/* "$HOWDAH_MOUNT"/*/*; do
    [ ! -s "$PGDATA/PG_VERSION" ] || [ ! -d "$PGDATA/global" ] || break
done
[ -s "$PGDATA/PG_VERSION" ] || give_up "there is no data directory of PostgreSQL on the volume at $HOWDAH_MOUNT"
export PGDATA
if [ "$(id -u)" = 0 ]; then
    # PostgreSQL does not run as root; whose the data is, it is.
    owner=$(stat -c %u "$PGDATA")
    group=$(stat -c %g "$PGDATA")
    : >"$report"
    chmod a+w "$report"
    if command -v setpriv >/dev/null && setpriv --help 2>&1 | grep -q -- --reuid; then
        exec setpriv --reuid="$owner" --regid="$group" --clear-groups sh -c "$HOWDAH_DRILL"
    elif command -v gosu >/dev/null; then
        exec gosu "$owner:$group" sh -c "$HOWDAH_DRILL"
    elif command -v su-exec >/dev/null; then
        exec su-exec "$owner:$group" sh -c "$HOWDAH_DRILL"
    fi
    give_up "the image has none of setpriv, gosu and su-exec, and PostgreSQL does not run as root"
fi
command -v postgres >/dev/null || give_up "there is no postgres in the image's PATH"

work=$(mktemp -d)
log=$work/log
role=${HOWDAH_ROLE:-postgres}
database=${HOWDAH_DATABASE:-postgres}
# What is said is read below, in English, and told in UTF-8. What the database sets for its role, such as a time limit, is not
# meant for a drill.
export LC_ALL=C PGCLIENTENCODING=UTF8
export PGOPTIONS='-c lc_messages=C -c statement_timeout=0 -c lock_timeout=0 -c default_transaction_read_only=off'

quoted() { printf '%s' "$1" | tr '\n\t\r' '   ' | tr -d '\000-\037' | cut -c 1-400 | sed 's/\\/\\\\/g; s/"/\\"/g'; }
# Milliseconds, where date knows of parts of a second: busybox may, but not of %3N.
now_ms() {
    case $(date +%N) in
        *[!0-9]* | '') echo "$(date +%s)000" ;;
        *) date +%s%N | cut -c 1-13 ;;
    esac
}
# What PostgreSQL says when it is the data that is bad, and not the place it is started in.
BAD='PANIC|invalid page|invalid .*checkpoint|could not locate a valid checkpoint|checksum|could not read blocks?|could not read file "(base|global|pg_wal|pg_xact|pg_tblspc)|could not open file "(base|global|pg_tblspc)/[^"]*": No such file|required WAL directory .* does not exist|unexpected data beyond EOF|missing chunk number|could not access status of transaction|database files are incompatible|control file contains invalid|corrupt'
# What it says when the disk or the memory of this place is at fault, or when somebody ended it.
PLACE='No space left|Input/output error|Cannot allocate memory|out of memory|could not resize shared memory|canceling statement|terminating connection|server closed the connection|connection to server'
say() {
    # $1: what is wrong, or nothing.
    {
        printf '{'
        [ -z "${version:-}" ] || printf '"postgresVersion":"%s",' "$(quoted "$version")"
        [ -z "${recovery_ms:-}" ] || printf '"recoveryMs":%s,' "$recovery_ms"
        [ -z "${identifier:-}" ] || printf '"systemIdentifier":"%s",' "$(quoted "$identifier")"
        [ -z "${databases:-}" ] || printf '"databases":%s,' "$databases"
        [ -z "${rows:-}" ] || printf '"rows":%s,' "$rows"
        [ -z "${checksums:-}" ] || printf '"checksums":%s,' "$checksums"
        [ -z "${answer+set}" ] || printf '"answer":"%s",' "$(quoted "$answer")"
        [ -z "$1" ] || printf '"damage":"%s",' "$(quoted "$1")"
        printf '"script":1}\n'
    } >"$report"
    [ -z "${server:-}" ] || kill -QUIT "$server" 2>/dev/null || :
    exit 0
}
# Condemns the backup if the text tells of bad data; else it is somebody else's fault.
judge() {
    bad=$(printf '%s\n' "$2" | grep -E -m 1 "$BAD" || :)
    if [ -n "$bad" ] && ! printf '%s\n' "$2" | grep -qE "$PLACE"; then
        say "$1: $bad"
    fi
    give_up "$1: $(printf '%s\n' "$2" | tail -n 1)"
}

# The links of the data directory lead to where the volumes were mounted when the backup was taken.
for link in "$PGDATA"/pg_wal "$PGDATA"/pg_tblspc/*; do
    [ ! -L "$link" ] || [ -d "$link" ] ||
        give_up "the link ${link#"$PGDATA"/} leads to $(readlink "$link"), where nothing is mounted: the backup lacks that volume, or it was mounted elsewhere then"
done

# A kubelet that applies an fsGroup opens it to the group, and PostgreSQL refuses that; the images' entrypoints close it, too.
chmod 0700 "$PGDATA"
# The clone is of a running server, which is not here.
rm -f "$PGDATA/postmaster.pid" "$PGDATA/standby.signal" "$PGDATA/recovery.signal" "$PGDATA/recovery.conf"
printf 'local all all trust\n' >"$work/hba"
# An image may keep its configuration elsewhere; what is in the data directory counts if it is there.
printf "include_if_exists '%s/postgresql.conf'\n" "$PGDATA" >"$work/conf"

started=$(now_ms)
# Nothing it does reaches anybody: no network, no archive, no standby, no job of its own. The little memory is for reading.
postgres -D "$PGDATA" \
    -c config_file="$work/conf" -c data_directory="$PGDATA" -c hba_file="$work/hba" -c external_pid_file= \
    -c listen_addresses= -c port=5432 -c unix_socket_directories="$work" -c ssl=off \
    -c archive_mode=off -c archive_command= -c restore_command= -c primary_conninfo= -c synchronous_standby_names= \
    -c max_logical_replication_workers=0 -c autovacuum=off -c logging_collector=off -c log_destination=stderr \
    -c log_min_messages=warning -c lc_messages=C -c shared_buffers=64MB -c huge_pages=off -c jit=off -c max_parallel_workers_per_gather=0 -c max_connections=20 \
    -c max_wal_senders=0 -c superuser_reserved_connections=0 >"$log" 2>&1 &
server=$!
ask() { psql -h "$work" -p 5432 -U "$role" -X -A -t -q -v ON_ERROR_STOP=1 "$@"; }
# Bounded by the pod's activeDeadlineSeconds.
until [ "$(ask -d postgres -c 'SELECT pg_is_in_recovery()' 2>"$work/error")" = f ]; do
    if ! kill -0 "$server" 2>/dev/null; then
        server=
        judge "PostgreSQL does not start" "$(cat "$log")"
    fi
    # It lets in, but not this role, or not as a superuser: that will not pass. Images that make such a role of POSTGRES_USER
    # have the usual superuser, too.
    if grep -qE 'role .* does not exist|permission denied to set parameter' "$work/error"; then
        [ "$role" != postgres ] || give_up "$(tail -n 1 "$work/error"): name the superuser as POSTGRES_USER"
        role=postgres
    fi
    sleep 0.2
done
recovery_ms=$(($(now_ms) - started))
# The checkpoint at the end of recovery lies where the WAL ended that was there.
if [ -n "${HOWDAH_REACHES:-}" ]; then
    behind=$(ask -d postgres -c "SELECT checkpoint_lsn FROM pg_control_checkpoint() WHERE checkpoint_lsn < '$HOWDAH_REACHES'::pg_lsn" 2>"$work/error") ||
        judge "the end of recovery cannot be read" "$(cat "$work/error")"
    [ -z "$behind" ] || say "recovery ended at $behind in the WAL, before $HOWDAH_REACHES, which the data is newer than"
fi
version=$(ask -d postgres -c 'SHOW server_version')
identifier=$(ask -d postgres -c 'SELECT system_identifier FROM pg_control_system()')
[ "$(ask -d postgres -c 'SHOW data_checksums')" = on ] && checksums=true || checksums=false

# Every row of every table, and with it every page of them; of what the system keeps and of long values too, which nobody
# counts as rows. An index could answer without the table.
databases=0
rows=0
ask -d postgres -c 'SELECT datname FROM pg_database WHERE datallowconn ORDER BY 1' >"$work/databases"
while IFS= read -r name; do
    databases=$((databases + 1))
    {
        echo "\\set ON_ERROR_STOP 1"
        echo "SET enable_indexonlyscan = off; SET enable_indexscan = off; SET enable_bitmapscan = off;"
        echo "SELECT format('SELECT %s * count(*) FROM ONLY %I.%I',"
        echo "(c.relkind <> 't' AND n.nspname NOT IN ('pg_catalog', 'information_schema'))::int, n.nspname, c.relname)"
        echo "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        echo "WHERE c.relkind IN ('r', 'm', 't') AND c.relpersistence = 'p' AND c.relispopulated \\gexec"
    } >"$work/count.sql"
    counted=$(ask -d "$name" -f "$work/count.sql" 2>"$work/error") || judge "the database $name cannot be read" "$(cat "$work/error")"
    for count in $counted; do rows=$((rows + count)); done
    # A table of more than a segment file reads well without its last one. PostgreSQL notes how many pages there were, and
    # lowers that after it cuts a table; one that was just cut ends exactly with a segment as good as never.
    cut=$(ask -d "$name" -v VERBOSITY=terse -c "SELECT format('%I.%I has %s pages, which end with a segment file, and had %s', n.nspname, c.relname, s.pages, c.relpages)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace,
        LATERAL (SELECT pg_relation_size(c.oid) / current_setting('block_size')::int AS pages) s
        WHERE c.relkind IN ('r', 'm', 't', 'i') AND c.relpersistence = 'p' AND s.pages BETWEEN 1 AND c.relpages - 1
        AND s.pages % (SELECT setting::int FROM pg_settings WHERE name = 'segment_size') = 0 LIMIT 1" 2>"$work/error") ||
        judge "the database $name cannot be read" "$(cat "$work/error")"
    [ -z "$cut" ] || say "the database $name lacks a part: $cut"
done <"$work/databases"

# Structure of heaps and indexes, where the image has the means.
if command -v pg_amcheck >/dev/null; then
    code=0
    pg_amcheck -h "$work" -p 5432 -U "$role" --all --install-missing >"$work/amcheck" 2>&1 || code=$?
    # 1 is for what it cannot do at all, such as an extension that is not there; 2 for corruption, and for a check that this
    # place had no room for.
    if [ "$code" = 2 ]; then
        ! grep -qE "$PLACE" "$work/amcheck" || give_up "pg_amcheck: $(grep -E -m 1 "$PLACE" "$work/amcheck")"
        say "pg_amcheck: $(head -n 2 "$work/amcheck" | tr '\n' ' ')"
    fi
fi

if [ -n "${HOWDAH_QUERY:-}" ]; then
    answer=$(ask -d "$database" -c "$HOWDAH_QUERY" 2>"$work/error") || judge "howdah.dev/verify-query failed" "$(cat "$work/error")"
fi
say ""
