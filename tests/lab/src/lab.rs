//! One lab: its name, its directory, its network namespace, and the lock that lets one command at a time
//! change it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cache::Inputs;
use crate::{files, postgres, process};

/// Where instances live unless `HOWDAH_LAB_DIR` names another parent. /var/tmp and not /tmp: a lab holds
/// gigabytes of disk images, and /tmp may be memory.
const DEFAULT_PARENT: &str = "/var/tmp/howdah-lab";
/// Longest lab name. It becomes part of Unix socket paths, which end at 107 bytes.
const NAME_LENGTH_MAX: usize = 24;
/// Digits of a parent's hash in a namespace's name: a handful of parents on one machine do not collide.
const PARENT_HASH_DIGITS: usize = 6;
/// How often a waiting command looks again whether the lab's lock is free.
const LOCK_POLL: Duration = Duration::from_millis(100);

/// A lab by name; it need not be up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lab {
    name: String,
    dir: PathBuf,
}

/// Held by the one command that changes a lab; given back on drop.
#[derive(Debug)]
pub struct InstanceLock {
    _file: File,
    path: PathBuf,
}

impl Lab {
    /// The lab called `name`, in `HOWDAH_LAB_DIR` or /var/tmp/howdah-lab. Fails on a name that could not be
    /// part of a path and of a network namespace's name.
    pub fn named(name: &str) -> Result<Self> {
        let parent = std::env::var_os("HOWDAH_LAB_DIR").map_or_else(|| DEFAULT_PARENT.into(), PathBuf::from);
        Self::in_parent(name, &parent)
    }

    fn in_parent(name: &str, parent: &Path) -> Result<Self> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let starts_well = name.starts_with(|c: char| c.is_ascii_lowercase());
        if !starts_well || name.len() > NAME_LENGTH_MAX || !name.chars().all(plain) {
            bail!(
                "name the lab with a lower-case letter first, then letters, digits and '-', \
                 {NAME_LENGTH_MAX} at most: {name:?} is not such a name"
            );
        }
        if !parent.is_absolute() {
            bail!("give HOWDAH_LAB_DIR as an absolute path: it is {}", parent.display());
        }
        Ok(Self { name: name.to_owned(), dir: parent.join(name) })
    }

    /// The lab's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory that holds everything of this instance; `down` removes it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path inside the instance directory.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.dir.join(relative)
    }

    /// The name of the lab's network namespace. Such names are the machine's, so labs of one name in different
    /// parents are told apart by their parent's hash.
    pub fn netns(&self) -> String {
        let parent = self.dir.parent().unwrap_or(Path::new("/"));
        if parent == Path::new(DEFAULT_PARENT) {
            return format!("howdah-{}", self.name);
        }
        let hash = Inputs::new("parent").text("path", &parent.to_string_lossy()).hash();
        format!("howdah-{}-{}", self.name, &hash[..PARENT_HASH_DIGITS])
    }

    /// The admin's kubeconfig, for use from outside the namespace.
    pub fn kubeconfig(&self) -> PathBuf {
        self.path("kubeconfig")
    }

    /// The admin's kubeconfig, for use inside the namespace.
    pub fn inside_kubeconfig(&self) -> PathBuf {
        self.path("kubeconfig-inside")
    }

    /// Whether an instance directory exists, which is what every step of `up` begins with.
    pub fn exists(&self) -> bool {
        self.dir.is_dir()
    }

    /// A command that carries the instance's mark (see [`process::MARK`]), the lab's own programs on its
    /// PATH and the configuration of the lab's clients. It runs in the caller's network namespace; to run it
    /// in the lab's, call it inside [`crate::netns::within`].
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap_or_default();
        let postgres = postgres::debian_directory();
        command
            .env(process::MARK, &self.dir)
            .env(
                "PATH",
                format!("{}:{}:{path}:/usr/sbin:/sbin", self.path("bin").display(), postgres.display()),
            )
            .env("KUBECONFIG", self.kubeconfig())
            .env("CEPH_CONF", self.path("ceph/ceph.conf"))
            // Each client process otherwise warns that it cannot bind the daemons' socket name.
            .env("CEPH_ARGS", format!("--admin-socket={}/run/$name.$pid.asok", self.path("ceph").display()));
        command
    }

    /// The lab's kubectl, with the administrator's rights. It ends before a collector of garbage would be of use, and a
    /// quarter of its processor time was the collector's.
    pub fn kubectl_command(&self) -> Command {
        let mut kubectl = self.command(self.path("bin/kubectl"));
        // A list of ten thousand objects is collected after all.
        kubectl.env("GOGC", "off").env("GOMEMLIMIT", "512MiB");
        kubectl
    }

    /// Takes the lab's lock, waiting at most `limit` for another command to finish.
    ///
    /// The lock file stands beside the instance directory, because `down` removes the directory; `down`
    /// removes the lock file too, so after locking we make sure that what we hold is still what is there.
    pub fn lock(&self, limit: Duration) -> Result<InstanceLock> {
        let path = self.dir.with_extension("lock");
        let parent = self.dir.parent().context("find the parent of the lab's directory")?;
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
        let deadline = Instant::now() + limit;
        loop {
            let file = File::create(&path).with_context(|| format!("open lock {}", path.display()))?;
            match file.try_lock() {
                Ok(()) if is_same_file(&file, &path)? => return Ok(InstanceLock { _file: file, path }),
                Ok(()) | Err(fs::TryLockError::WouldBlock) => {}
                Err(fs::TryLockError::Error(error)) => {
                    return Err(error).with_context(|| format!("lock {}", path.display()));
                }
            }
            if Instant::now() >= deadline {
                bail!(
                    "wait for the other howdah-lab command that changes lab {}: it still holds {} after {} s",
                    self.name,
                    path.display(),
                    limit.as_secs()
                );
            }
            thread::sleep(LOCK_POLL);
        }
    }
}

impl InstanceLock {
    /// Gives the lock back and removes its file, when the instance is gone.
    pub fn remove(self) -> Result<()> {
        files::remove_file(&self.path)
    }
}

fn is_same_file(file: &File, path: &Path) -> Result<bool> {
    let held = file.metadata().with_context(|| format!("look at lock {}", path.display()))?;
    match fs::metadata(path) {
        Ok(found) => Ok(found.ino() == held.ino() && found.dev() == held.dev()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("look at lock {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_would_leave_the_directory_is_refused() {
        for name in ["", "..", "a/b", "A", "1a", "-a", "a b", "abcdefghijklmnopqrstuvwxy"] {
            let error = Lab::in_parent(name, Path::new("/x")).unwrap_err().to_string();
            assert!(error.contains(&format!("{name:?}")), "{error}");
        }
        let lab = Lab::in_parent("tests-2", Path::new("/x")).unwrap();
        assert_eq!(lab.dir(), Path::new("/x/tests-2"));
        let other = Lab::in_parent("tests-2", Path::new("/y")).unwrap();
        assert_ne!(lab.netns(), other.netns(), "two labs of one name in one network");
        assert_eq!(Lab::in_parent("a", Path::new(DEFAULT_PARENT)).unwrap().netns(), "howdah-a");
    }

    #[test]
    fn one_command_at_a_time_holds_the_lock_even_when_its_file_was_removed() {
        let parent = tempfile::tempdir().unwrap();
        let lab = Lab::in_parent("a", parent.path()).unwrap();
        let held = lab.lock(Duration::ZERO).unwrap();
        let refused = lab.lock(Duration::from_millis(250)).unwrap_err().to_string();
        assert!(refused.contains("still holds"), "{refused}");
        held.remove().unwrap();
        let again = lab.lock(Duration::ZERO).unwrap();
        assert!(parent.path().join("a.lock").exists());
        again.remove().unwrap();
        assert!(!parent.path().join("a.lock").exists());
    }
}
