# $1: folder to work in, with archive/; $2: folder of containerd and ctr; $3: size. Leaves $1/disk.ext4.
# This shell leads a process namespace of its own: when it ends, so does containerd.
export PATH="$2:$PATH:/usr/sbin:/sbin"
work=$1
mount -t proc proc /proc
# Ours alone, and short: a socket's path must fit in 107 bytes.
mount -t tmpfs tmpfs /run
cat >"$work/config.toml" <<END
version = 3
root = "$work/store"
state = "/run/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs"]
[grpc]
  address = "/run/containerd.sock"
[ttrpc]
  address = "/run/containerd.ttrpc"
END
containerd --config "$work/config.toml" >"$work/log" 2>&1 &
daemon=$!
tries=0
until ctr --address "/run/containerd.sock" version >/dev/null 2>&1; do
    tries=$((tries + 1))
    # 60 s: it takes one, on an idle machine.
    [ "$tries" -lt 300 ] || { tail -n 20 "$work/log" >&2; exit 1; }
    sleep 0.2
done
tar -C "$work/archive" --dereference -c . |
    ctr --address "/run/containerd.sock" --namespace k8s.io images import --snapshotter overlayfs - >"$work/import" 2>&1 ||
    { tail -n 20 "$work/import" "$work/log" >&2; exit 1; }
kill "$daemon"
wait "$daemon" || true
rm -rf "$work/store/io.containerd.runtime.v2.task"
# No journal: a node's writes are thrown away with its VM. Tables complete, or the node's kernel would fill
# them in while it starts.
mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=0,nodiscard,root_owner=0:0 -d "$work/store" \
    "$work/disk.ext4" "$3" 2>"$work/mkfs" || { cat "$work/mkfs" >&2; exit 1; }
rm -rf "$work/store" "$work/archive" "$work/log" "$work/import" "$work/mkfs" "$work/config.toml"
