# $1: folder; $2: lowerdir of the root tree's layers; $3: size of the root disk.
# Leaves $1/kernel, with the library it runs with, and $1/root.ext4.
export PATH="$PATH:/usr/sbin:/sbin"
target=$1
mkdir "$target/root"
mount -t overlay overlay -o "lowerdir=$2" "$target/root"

cp -r "$target/root/boot" "$target/kernel"

# No journal: a node's writes are thrown away with its VM. Tables complete, or the node's kernel would fill
# them in while it starts.
mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=0,nodiscard,root_owner=0:0 -d "$target/root" \
    "$target/root.ext4" "$3" 2>"$target/mkfs" || { cat "$target/mkfs" >&2; exit 1; }
umount "$target/root"
rm -rf "$target/root" "$target/mkfs"
