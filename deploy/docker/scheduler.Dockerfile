# From the repository's root:  docker build -f deploy/docker/scheduler.Dockerfile -t REGISTRY/howdah/scheduler:0.1.0 .
# The lab builds the last stage of this file itself, without a container engine: keep it to plain
# FROM, RUN, COPY, USER, EXPOSE, ENTRYPOINT and LABEL.
FROM rust:1.95-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends cmake && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p howdah-scheduler

FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="howdah-scheduler" org.opencontainers.image.licenses="Apache-2.0"
# The rbd and ceph commands.
RUN apt-get update && apt-get install -y --no-install-recommends ceph-common && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/howdah-scheduler /usr/local/bin/howdah-scheduler
# A number, not a name: Kubernetes can prove only of a number that it is not root.
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["/usr/local/bin/howdah-scheduler"]
