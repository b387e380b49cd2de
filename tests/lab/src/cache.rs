//! Things that take long to build are built once per hash of their inputs and kept under ~/.cache/howdah,
//! for every lab and every clone on this machine.
//!
//! An entry is a directory KIND/HASH. It is built beside its place and renamed into it, so an entry that
//! exists is complete. A lock per entry keeps two labs from building the same thing at once.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::process::{self, Identity};
use crate::{files, mounts, progress};

/// The longest we wait for another lab to finish the same build: the longest build, from nothing on two busy
/// cores, took seven minutes.
const LOCK_LIMIT: Duration = Duration::from_secs(45 * 60);
/// How often we look whether the other lab has finished.
const LOCK_POLL: Duration = Duration::from_millis(200);
/// Hexadecimal digits of the hash that name an entry; 80 bits do not collide by accident.
pub const NAME_DIGITS: usize = 20;

/// What a build depends on. Two builds with equal inputs give the same entry.
#[derive(Clone, Debug)]
pub struct Inputs(Sha256);

impl Inputs {
    /// Begins with the recipe: a text that changes when the way of building changes.
    pub fn new(recipe: &str) -> Self {
        Self(Sha256::new()).text("recipe", recipe)
    }

    /// Adds a named text.
    #[must_use]
    pub fn text(self, name: &str, value: &str) -> Self {
        self.bytes(name, value.as_bytes())
    }

    /// Adds a file's name (not its place, which differs from clone to clone) and content.
    pub fn file(self, path: &Path) -> Result<Self> {
        let name = path.file_name().context("read the file's name")?.to_string_lossy().into_owned();
        let mut content = Vec::new();
        File::open(path)
            .and_then(|mut file| file.read_to_end(&mut content))
            .with_context(|| format!("read {}", path.display()))?;
        Ok(self.bytes(&name, &content))
    }

    /// Adds every regular file below `directory`, by relative path and content, in a fixed order.
    pub fn tree(mut self, directory: &Path) -> Result<Self> {
        let mut files = Vec::new();
        list(directory, &mut files)?;
        files.sort();
        for path in files {
            let relative = path.strip_prefix(directory).context("name a file below its folder")?;
            let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            self = self.bytes(&relative.to_string_lossy(), &content);
        }
        Ok(self)
    }

    fn bytes(mut self, name: &str, value: &[u8]) -> Self {
        // Lengths keep ("ab", "c") and ("a", "bc") apart.
        self.0.update((name.len() as u64).to_le_bytes());
        self.0.update(name);
        self.0.update((value.len() as u64).to_le_bytes());
        self.0.update(value);
        self
    }

    /// The name of the entry with these inputs.
    pub fn hash(&self) -> String {
        let digest = self.0.clone().finalize();
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        hex[..NAME_DIGITS].to_owned()
    }
}

fn list(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("list {}", directory.display()))?;
        let kind = entry.file_type().with_context(|| format!("look at {}", entry.path().display()))?;
        if kind.is_dir() {
            list(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Where entries are kept: `HOWDAH_CACHE`, or ~/.cache/howdah.
pub fn root() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("HOWDAH_CACHE") {
        return Ok(path.into());
    }
    let home = std::env::var_os("HOME").context("find the cache: set HOME or HOWDAH_CACHE")?;
    Ok(Path::new(&home).join(".cache/howdah"))
}

/// Whether a directory of this name, inside a kind's, is an entry: the cache holds other things too.
pub fn is_entry_name(name: &str) -> bool {
    name.len() == NAME_DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The directory of the entry `kind` with `inputs`; `build` fills an empty directory with it if it is not
/// there yet. `what` names it in progress lines.
pub fn entry(
    kind: &str,
    inputs: &Inputs,
    what: &str,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let hash = inputs.hash();
    let directory = root()?.join(kind);
    let entry = directory.join(&hash);
    if entry.is_dir() {
        return Ok(entry);
    }
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    let _lock = lock(&directory.join(format!("{hash}.lock")), what)?;
    if entry.is_dir() {
        return Ok(entry);
    }
    sweep(&directory, Some(&hash))?;
    let own = Identity::of(i32::try_from(std::process::id()).context("read own process id")?)
        .context("read own start time")?;
    let temporary = directory.join(format!("{hash}.{}-{}.building", own.pid, own.start_time));
    fs::create_dir(&temporary).with_context(|| format!("create {}", temporary.display()))?;
    let built =
        progress::slow(&format!("building {what} (kept in {})", entry.display()), || build(&temporary));
    if let Err(error) = built {
        // The build's own error matters more than what is left of its files; the next build sweeps them.
        let _ = discard(&temporary);
        return Err(error.context(format!("build {what}")));
    }
    fs::rename(&temporary, &entry).with_context(|| format!("put {} into the cache", entry.display()))?;
    Ok(entry)
}

/// Removes what killed builds left behind, with the mounts they may have left inside.
pub fn sweep_abandoned() -> Result<()> {
    let root = root()?;
    let kinds = match fs::read_dir(&root) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        kinds => kinds.with_context(|| format!("list {}", root.display()))?,
    };
    for kind in kinds {
        let kind = kind.with_context(|| format!("list {}", root.display()))?.path();
        if kind.is_dir() {
            sweep(&kind, None)?;
        }
    }
    Ok(())
}

/// Removes unfinished builds whose builder is dead; only those of one entry if `hash` is given.
fn sweep(directory: &Path, hash: Option<&str>) -> Result<()> {
    for file in fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))? {
        let file = file.with_context(|| format!("list {}", directory.display()))?;
        let name = file.file_name().to_string_lossy().into_owned();
        let Some((of, builder)) = builder_of(&name) else { continue };
        if hash.is_none_or(|hash| hash == of) && !builder.is_alive() {
            discard(&file.path())?;
        }
    }
    Ok(())
}

fn builder_of(name: &str) -> Option<(&str, Identity)> {
    let (hash, builder) = name.strip_suffix(".building")?.split_once('.')?;
    let (pid, start_time) = builder.split_once('-')?;
    Some((hash, Identity { pid: pid.parse().ok()?, start_time: start_time.parse().ok()? }))
}

fn discard(directory: &Path) -> Result<()> {
    mounts::unmount_below(directory)?;
    files::remove_tree(directory)
}

fn lock(path: &Path, what: &str) -> Result<File> {
    let file = File::create(path).with_context(|| format!("open lock {}", path.display()))?;
    let deadline = Instant::now() + LOCK_LIMIT;
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("lock {}", path.display()));
            }
            Err(fs::TryLockError::WouldBlock) if Instant::now() >= deadline => bail!(
                "wait for {what}, which somebody else is building: they still hold {} after {} min",
                path.display(),
                LOCK_LIMIT.as_secs() / 60
            ),
            Err(fs::TryLockError::WouldBlock) => {}
        }
        if !told {
            progress::say(format!("waiting for {what}, which somebody else is building"));
            told = true;
        }
        thread::sleep(LOCK_POLL);
    }
}

/// A Go module of the lab and how to build it.
#[derive(Clone, Copy, Debug)]
pub struct GoModule<'a> {
    /// The folder below tests/lab/go; also the kind of the cache entry.
    pub name: &'a str,
    /// Build tags.
    pub tags: &'a [&'a str],
    /// Linker flags beside `-s -w`.
    pub linker_flags: &'a [&'a str],
    /// What to build: `.`, or packages of required modules. Each gives a binary of its last path element.
    pub packages: &'a [&'a str],
}

/// Builds a Go module's binaries, statically linked, into a cache entry; gives the entry's directory.
pub fn go_binaries(module: &GoModule<'_>) -> Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("go").join(module.name);
    let linker_flags = format!("-s -w {}", module.linker_flags.join(" "));
    let tags = module.tags.join(",");
    let inputs = Inputs::new("CGO_ENABLED=0 go build -trimpath -mod=readonly")
        .text("linker flags", linker_flags.trim())
        .text("tags", &tags)
        .text("packages", &module.packages.join(" "))
        .tree(&source)?;
    entry(module.name, &inputs, &format!("Go binaries of go/{}", module.name), |target| {
        let mut command = go()?;
        command.args([
            "build",
            "-trimpath",
            "-mod=readonly",
            "-tags",
            &tags,
            "-ldflags",
            linker_flags.trim(),
        ]);
        // The trailing slash makes -o a folder for one package as for many.
        command.arg("-o").arg(target.join("")).args(module.packages);
        command.current_dir(&source).env("CGO_ENABLED", "0");
        process::output_of(&mut command).map(drop)
    })
}

/// The `go` command, also where its own archive puts it without being on the PATH.
fn go() -> Result<Command> {
    const PLACES: [&str; 2] = ["go", "/usr/local/go/bin/go"];
    let works =
        |place: &&str| Command::new(place).arg("version").output().is_ok_and(|out| out.status.success());
    let place = PLACES
        .into_iter()
        .find(works)
        .context("find the go command, which builds Kubernetes and containerd: `make setup` installs it")?;
    Ok(Command::new(place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargos_folder_is_no_entry() {
        assert!(is_entry_name(&Inputs::new("x").hash()));
        assert!(!is_entry_name("release") && !is_entry_name("debug"));
    }

    #[test]
    fn inputs_differ_by_name_order_and_boundaries_and_not_by_place() {
        let hash = |pairs: &[(&str, &str)]| {
            pairs.iter().fold(Inputs::new("r"), |inputs, (name, value)| inputs.text(name, value)).hash()
        };
        assert_ne!(hash(&[("ab", "c")]), hash(&[("a", "bc")]));
        assert_ne!(hash(&[("a", "1"), ("b", "2")]), hash(&[("b", "2"), ("a", "1")]));
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for clone in [&one, &two] {
            fs::create_dir(clone.path().join("d")).unwrap();
            fs::write(clone.path().join("d/x"), "x").unwrap();
            fs::write(clone.path().join("a"), "a").unwrap();
        }
        let tree = |clone: &tempfile::TempDir| Inputs::new("r").tree(clone.path()).unwrap().hash();
        assert_eq!(tree(&one), tree(&two));
        fs::write(two.path().join("d/x"), "y").unwrap();
        assert_ne!(tree(&one), tree(&two));
    }

    #[test]
    fn an_unfinished_build_is_swept_only_when_its_builder_is_dead() {
        let kind = tempfile::tempdir().unwrap();
        let own = Identity::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        let alive = kind.path().join(format!("aa.{}-{}.building", own.pid, own.start_time));
        let dead = kind.path().join(format!("aa.{}-{}.building", own.pid, own.start_time + 1));
        let complete = kind.path().join("bb");
        for directory in [&alive, &dead, &complete] {
            fs::create_dir(directory).unwrap();
        }
        sweep(kind.path(), None).unwrap();
        assert!(alive.exists() && complete.exists() && !dead.exists());
    }
}
