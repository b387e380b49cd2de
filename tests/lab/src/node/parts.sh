# $1: folder, with init; $2: lowerdir of the root tree's layers; $3: size of the root disk.
# Leaves $1/vmlinuz, $1/initramfs and $1/root.ext4.
export PATH="$PATH:/usr/sbin:/sbin"
target=$1
mkdir "$target/root" "$target/initramfs.d" "$target/initramfs.d/bin" "$target/initramfs.d/modules"
mount -t overlay overlay -o "lowerdir=$2" "$target/root"

cp "$target/root/boot/vmlinuz" "$target/vmlinuz"

release=$(ls "$target/root/usr/lib/modules")
# crc32c-intel wants a processor feature that emulation may not have; crc32c_generic does the work.
chroot "$target/root" modprobe -S "$release" --all --show-depends \
    virtio_pci virtio_blk virtio_net virtio_console virtio_rng ext4 crc32c_generic >"$target/modules"
while read -r verb module _; do
    name=${module##*/}
    if [ "$verb" = insmod ] && [ "$name" != crc32c-intel.ko ] &&
        [ ! -e "$target/initramfs.d/modules/$name" ]; then
        cp "$target/root$module" "$target/initramfs.d/modules/"
        echo "$name" >>"$target/initramfs.d/modules.list"
    fi
done <"$target/modules"
cp "$target/root/bin/busybox" "$target/initramfs.d/bin/busybox"
install -m 0755 "$target/init" "$target/initramfs.d/init"
(cd "$target/initramfs.d" && find . | cpio --quiet -o -H newc | gzip -1) >"$target/initramfs"

# No journal: a node's writes are thrown away with its VM. Tables complete, or the node's kernel would fill
# them in while it starts.
mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=0,nodiscard,root_owner=0:0 -d "$target/root" \
    "$target/root.ext4" "$3" 2>"$target/mkfs" || { cat "$target/mkfs" >&2; exit 1; }
umount "$target/root"
rm -rf "$target/root" "$target/initramfs.d" "$target/modules" "$target/mkfs" "$target/init"
