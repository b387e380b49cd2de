# PostgreSQL 15 with the interface of the official image (docker.io/library/postgres), from Debian's packages.
# The build context is tests/lab/images.
FROM debian:bookworm-slim
# Before the package makes the user with a number of its own: 999 is the official image's, and volumes hold it.
RUN groupadd --system --gid=999 postgres \
    && useradd --system --gid=postgres --uid=999 --home-dir=/var/lib/postgresql --shell=/bin/bash postgres \
    && install -d -o postgres -g postgres -m 1777 /var/lib/postgresql
RUN export DEBIAN_FRONTEND=noninteractive \
    && apt-get update && apt-get install -y --no-install-recommends postgresql-common locales \
    && sed -i 's/#\?create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf \
    && apt-get install -y --no-install-recommends postgresql-15 postgresql-client-15 \
    && echo 'en_US.UTF-8 UTF-8' >/etc/locale.gen && locale-gen \
    && sed -i "s/^#\?listen_addresses.*/listen_addresses = '*'/" /usr/share/postgresql/15/postgresql.conf.sample \
    && install -d -o postgres -g postgres -m 3777 /var/run/postgresql \
    && install -d -o postgres -g postgres -m 1777 /var/lib/postgresql/data \
    && install -d /docker-entrypoint-initdb.d \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/lib/postgresql/15
ENV LANG=en_US.UTF-8
ENV PG_MAJOR=15
ENV PATH=/usr/lib/postgresql/15/bin:$PATH
ENV PGDATA=/var/lib/postgresql/data
COPY --chmod=0755 postgres/docker-entrypoint.sh /usr/local/bin/docker-entrypoint.sh
VOLUME /var/lib/postgresql/data
ENTRYPOINT ["docker-entrypoint.sh"]
# A fast shutdown: PostgreSQL takes SIGTERM as "wait until every client has gone".
STOPSIGNAL SIGINT
EXPOSE 5432
CMD ["postgres"]
