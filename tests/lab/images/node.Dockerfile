# The root tree of a node VM: what a Kubernetes node on Debian carries, with the distribution's own kernel.
# The lab builds it with its own interpreter and packs it into the VM's first disk.
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends \
        busybox-static ca-certificates ceph-common conntrack e2fsprogs ethtool iproute2 kmod mount nftables \
        procps runc util-linux \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
# The kernel comes unpacked: its package's scripts would build an initramfs for a machine this is not.
# Drivers of hardware that a VM does not have are most of its size.
RUN apt-get update && cd /tmp \
    && apt-get download "$(apt-cache depends --important linux-image-amd64 | sed -n 's/.*Depends: //p')" \
    && dpkg-deb -x linux-image-*.deb kernel \
    && mv kernel/boot/vmlinuz-* /boot/vmlinuz && mv kernel/lib/modules /usr/lib/modules \
    && cd /usr/lib/modules/*/kernel && rm -rf sound drivers/gpu drivers/media drivers/net/wireless \
        drivers/net/ethernet drivers/scsi drivers/infiniband drivers/iio drivers/staging drivers/usb \
        drivers/hid drivers/input drivers/video drivers/target drivers/mtd drivers/ata drivers/hwmon \
    && depmod "$(ls /usr/lib/modules)" \
    && rm -rf /tmp/* /var/lib/apt/lists/* /var/cache/apt/*
# Whom the kubelet asks for time when the node is shut down. Without systemd that is elogind; its package would take the
# place of a library that apt itself stands on, and the daemon needs none of that.
RUN apt-get update && apt-get install -y --no-install-recommends dbus-daemon dbus-system-bus-common libcap2 libpam0g \
    && cd /tmp && apt-get download elogind \
    && dpkg-deb --fsys-tarfile elogind_*.deb | tar --extract --directory=/ --keep-directory-symlink \
    && ln -sf /bin/busybox /sbin/poweroff \
    && rm -rf /tmp/* /var/lib/apt/lists/* /var/cache/apt/*
COPY --from=kubernetes /bin/howdah-kube /usr/local/bin/howdah-kube
COPY --from=containerd /bin/containerd /bin/containerd-shim-runc-v2 /bin/ctr /usr/local/bin/
COPY --from=storage /bin/howdah-lab-csi /usr/local/bin/howdah-lab-csi
COPY --from=containerd /bin/bridge /bin/host-local /bin/loopback /opt/cni/bin/
COPY node/inittab /etc/inittab
COPY node/logind.conf /etc/elogind/logind.conf.d/lab.conf
COPY node/containerd.toml /etc/containerd/config.toml
COPY node/kubelet.yaml node/kube-proxy.yaml /etc/kubernetes/
COPY --chmod=0755 node/boot node/run /usr/local/lib/howdah/
