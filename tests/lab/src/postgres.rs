//! A real PostgreSQL server of any supported major version on this machine, as the user `postgres`: it refuses to run as
//! root.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::unistd::User;

use crate::cache;
use crate::process::output_of;

/// The major versions that howdah supports.
pub const MAJORS: [u32; 5] = [14, 15, 16, 17, 18];
/// The one of them that comes from Debian.
pub const DEBIAN_MAJOR: u32 = 15;
/// The password of every server's superuser `postgres`.
pub const PASSWORD: &str = "correct horse";

/// The others, as `make setup` puts them into the cache.
const FETCHED: &str = include_str!("../postgres.txt");
const USER: &str = "postgres";

/// The programs of one major version, where the user `postgres` can run them.
#[derive(Clone, Debug)]
pub struct Binaries {
    directory: PathBuf,
    uid: u32,
    gid: u32,
}

impl Binaries {
    /// Finds them. `place` is a directory that every user can enter: what lies in the cache is copied there, because
    /// the cache lies in root's home, which nobody else can.
    pub fn find(major: u32, place: &Path) -> Result<Self> {
        let Some(user) = User::from_name(USER).context("look for the user postgres")? else {
            bail!("find the user {USER}: run make setup, which installs postgresql-{DEBIAN_MAJOR}")
        };
        let directory =
            if major == DEBIAN_MAJOR { debian_directory() } else { fetched(major, place)?.join("bin") };
        if !directory.join("postgres").is_file() {
            bail!("find PostgreSQL {major} in {}: run make setup, which brings it", directory.display());
        }
        Ok(Self { directory, uid: user.uid.as_raw(), gid: user.gid.as_raw() })
    }

    /// Makes a database cluster in `data`, whose parent exists: small, and not synced, which a template need not be.
    pub fn initdb(&self, data: &Path) -> Result<()> {
        let parent = data.parent().context("find the parent of the data directory")?;
        self.give(parent)?;
        let password = parent.join("password");
        fs::write(&password, PASSWORD).context("write the superuser's password")?;
        let mut initdb = Command::new(self.directory.join("initdb"));
        initdb.uid(self.uid).gid(self.gid).current_dir(parent).env("LC_ALL", "C.UTF-8");
        initdb.args(["--auth=scram-sha-256", "--username=postgres", "--no-sync", "--wal-segsize=1"]);
        initdb.arg(format!("--pwfile={}", password.display())).arg("--pgdata").arg(data);
        output_of(&mut initdb).map(drop)
    }

    /// Gives a file or directory to the user that the server runs as.
    pub fn give(&self, path: &Path) -> Result<()> {
        chown(path, Some(self.uid), Some(self.gid)).with_context(|| format!("chown {}", path.display()))
    }

    /// The server on `data`; where it runs and what becomes of its output is the caller's business.
    pub fn server(&self, data: &Path) -> Command {
        let mut server = Command::new("setpriv");
        server.args(["--reuid", USER, "--regid", USER, "--clear-groups"]);
        server.arg(self.directory.join("postgres")).arg("-D").arg(data);
        server
    }
}

/// Where Debian's server and clients are. The clients on the usual `PATH` are a Perl script that looks for these, which costs
/// more than a query.
#[must_use]
pub fn debian_directory() -> PathBuf {
    PathBuf::from(format!("/usr/lib/postgresql/{DEBIAN_MAJOR}/bin"))
}

/// Appends lines to a file in a data directory, for instance `postgresql.conf`.
pub fn append(data: &Path, file: &str, lines: &str) -> Result<()> {
    let path = data.join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    fs::write(&path, format!("{text}\n{lines}\n")).with_context(|| format!("write {}", path.display()))
}

/// A copy of a server of the cache in `place`, made once.
fn fetched(major: u32, place: &Path) -> Result<PathBuf> {
    let lines = FETCHED.lines().filter(|line| !line.starts_with('#'));
    let found = lines
        .filter_map(|line| line.split_once(' '))
        .find(|(version, _)| version.split('.').next() == Some(&major.to_string()));
    let (version, hash) =
        found.with_context(|| format!("find PostgreSQL {major} in tests/lab/postgres.txt"))?;
    let hash = hash.trim().get(..cache::NAME_DIGITS).context("read the hash in tests/lab/postgres.txt")?;
    let kept = cache::root()?.join("postgres").join(hash);
    if !kept.is_dir() {
        bail!("find PostgreSQL {version} in {}: run make setup, which fetches it", kept.display());
    }
    let copy = place.join(format!("postgres-{version}"));
    if copy.is_dir() {
        return Ok(copy);
    }
    // Renamed when whole, so that a killed test leaves no half server; two tests may copy at the same time.
    let part = tempfile::Builder::new().prefix("postgres-").tempdir_in(place).context("make a directory")?;
    let whole = part.path().join("copy");
    output_of(Command::new("cp").arg("-a").arg(&kept).arg(&whole))?;
    if fs::rename(&whole, &copy).is_err() && !copy.is_dir() {
        bail!("put PostgreSQL {version} into {}", copy.display());
    }
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_supported_version_that_debian_lacks_is_pinned() {
        for major in MAJORS.into_iter().filter(|major| *major != DEBIAN_MAJOR) {
            let line = FETCHED.lines().find(|line| line.starts_with(&format!("{major}.")));
            let hash = line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default();
            assert!(hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()), "{major}: {hash}");
        }
    }
}
