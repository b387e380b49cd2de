#!/bin/bash
# Writes /etc/ceph/ceph.conf and keyring for the admin, and keeps ceph.conf right when the monitors move; as
# the script in Rook's toolbox manifest. Read: ROOK_CEPH_USERNAME (client.admin), and ROOK_CEPH_SECRET or the
# mounted /var/lib/rook-ceph-mon/secret.keyring; monitors in the mounted /etc/rook/mon-endpoints.
set -euo pipefail

config=/etc/ceph/ceph.conf
keyring=/etc/ceph/keyring
endpoints=/etc/rook/mon-endpoints
# Rook's script looks as often.
poll_seconds=5

write_config() {
    # "a=10.0.0.1:6789,b=..." without the names.
    local monitors
    monitors=$(sed 's/[a-z0-9_-]\+=//g' "$endpoints")
    cat >"$config" <<END
[global]
mon_host = $monitors

[${ROOK_CEPH_USERNAME:-client.admin}]
keyring = $keyring
END
}

secret=${ROOK_CEPH_SECRET:-}
if [ -z "$secret" ]; then
    secret=$(cat /var/lib/rook-ceph-mon/secret.keyring)
fi
umask 077
cat >"$keyring" <<END
[${ROOK_CEPH_USERNAME:-client.admin}]
key = $secret
END
umask 022

trap 'exit 0' TERM INT
seen=
while true; do
    now=$(cat "$endpoints")
    if [ "$now" != "$seen" ]; then
        write_config
        seen=$now
    fi
    sleep "$poll_seconds" &
    wait $! || true
done
