# The image of Rook's toolbox: Ceph's command line. Its Deployment runs /usr/local/bin/toolbox.sh, as Rook's
# does. The build context is tests/lab/images.
FROM debian:bookworm-slim
# The same words as in deploy/docker/scheduler.Dockerfile, so that the layer is built once for both.
RUN apt-get update && apt-get install -y --no-install-recommends ceph-common && rm -rf /var/lib/apt/lists/*
COPY --chmod=0755 toolbox/toolbox.sh /usr/local/bin/toolbox.sh
RUN install -d -m 0777 /etc/ceph
CMD ["/usr/local/bin/toolbox.sh"]
