# The root tree of a node VM: what a Kubernetes node on Debian carries, with the distribution's own kernel.
# The lab builds it with its own interpreter and packs it into the VM's first disk.
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends \
        busybox-static ca-certificates ceph-common conntrack e2fsprogs ethtool iproute2 iptables kmod mount \
        procps runc util-linux \
    && update-alternatives --set iptables /usr/sbin/iptables-legacy \
    && update-alternatives --set ip6tables /usr/sbin/ip6tables-legacy \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
# A kernel that runs as a process, and the C library that it wants, both of the next Debian: with the kernel of this one a fork
# takes twice as long.
RUN echo 'deb http://deb.debian.org/debian trixie main' >/etc/apt/sources.list.d/trixie.list && apt-get update && cd /tmp \
    && apt-get download user-mode-linux/trixie libc6/trixie \
    && dpkg-deb -x user-mode-linux_*.deb kernel && dpkg-deb -x libc6_*.deb library \
    && mkdir -p /boot/lib && mv kernel/usr/bin/linux.uml /boot/linux && mv kernel/usr/lib/uml/modules /usr/lib/modules \
    && cp library/usr/lib/x86_64-linux-gnu/libc.so.6 library/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 /boot/lib/ \
    && depmod "$(ls /usr/lib/modules)" && ln -sf /bin/busybox /sbin/init \
    && rm -rf /etc/apt/sources.list.d/trixie.list /tmp/* /var/lib/apt/lists/* /var/cache/apt/*
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
