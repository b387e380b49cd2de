# $1: folder to fill. Debian's minimal base as the debian:bookworm-slim image has it, left in $1/changes.
export PATH="$PATH:/usr/sbin:/sbin"
mkdir "$1/changes" "$1/work" "$1/empty" "$1/merged"
# volatile: whoever is interrupted throws all of this away, so nothing need be synced to the disk.
mount -t overlay overlay -o "lowerdir=$1/empty,upperdir=$1/changes,workdir=$1/work,volatile" "$1/merged"
debootstrap --variant=minbase bookworm "$1/merged" http://deb.debian.org/debian >"$1/log" 2>&1 ||
    { tail -n 20 "$1/log" >&2; exit 1; }
cd "$1/merged"
rm -rf var/cache/apt/archives/*.deb var/lib/apt/lists/* var/log/* dev/* etc/hostname
: >etc/resolv.conf
cat >etc/apt/sources.list <<'END'
deb http://deb.debian.org/debian bookworm main
deb http://deb.debian.org/debian bookworm-updates main
deb http://deb.debian.org/debian-security bookworm-security main
END
cat >etc/apt/apt.conf.d/docker-like <<'END'
APT::Install-Suggests "false";
Acquire::Languages "none";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
END
cat >etc/dpkg/dpkg.cfg.d/slim <<'END'
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/man/*
path-exclude /usr/share/info/*
path-exclude /usr/share/locale/*
END
# No package may start its service while it is installed.
printf '#!/bin/sh\nexit 101\n' >usr/sbin/policy-rc.d
chmod 755 usr/sbin/policy-rc.d
find usr/share/doc usr/share/man usr/share/info usr/share/locale -type f ! -name copyright -delete
cd /
umount "$1/merged"
rm -rf "$1/work" "$1/empty" "$1/merged" "$1/log"
