# One layer. $1: folder of the layer, with changes/; $2: lowerdir; $3: what to do.
export PATH="$PATH:/usr/sbin:/sbin"
layer=$1 lower=$2 verb=$3
shift 3
mkdir "$layer/work" "$layer/merged"
# Without the extensions of newer kernels, what changed is plain files and white-outs. volatile: an
# interrupted layer is thrown away, so nothing need be synced to the disk.
mount -t overlay overlay \
    -o "lowerdir=$lower,upperdir=$layer/changes,workdir=$layer/work,redirect_dir=off,metacopy=off,index=off,volatile" \
    "$layer/merged"
case "$verb" in
copy)
    # tar enters folders that are links in the image (/bin), where cp would refuse.
    tar -C "$1" --owner=0 --group=0 --numeric-owner -c . |
        if [ -x "$layer/merged/usr/bin/tar" ]; then
            chroot "$layer/merged" tar -x -C / -p --keep-directory-symlink --no-overwrite-dir
        else
            tar -x -C "$layer/merged" -p --no-overwrite-dir
        fi
    ;;
run)
    user=$1
    shift 2
    mount -t proc proc "$layer/merged/proc"
    mount --rbind /dev "$layer/merged/dev"
    mount --bind /etc/resolv.conf "$layer/merged/etc/resolv.conf"
    if [ -n "$user" ]; then
        set -- chroot --userspec="$user" "$layer/merged" "$@"
    else
        set -- chroot "$layer/merged" "$@"
    fi
    # Nobody reads a build's output unless it fails.
    "$@" >"$layer/log" 2>&1 </dev/null || { tail -n 30 "$layer/log" >&2; exit 1; }
    rm -f "$layer/log"
    ;;
esac
