//! The lab's long-running processes. Each is recorded by pid and start time before it becomes what it shall
//! be, and carries the instance's mark in its environment, so that `down` finds it even when the `up` that
//! started it was killed half-way, and never ends a process that merely got an old pid.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, setsid};

use crate::lab::Lab;
use crate::{files, netns};

/// Environment variable that marks every process of an instance; its value is the instance directory.
pub const MARK: &str = "HOWDAH_LAB_INSTANCE";
/// Our own binary by a name that stays right when a build replaces the file.
const SELF: &str = "/proc/self/exe";
/// A new process records itself within milliseconds; this allows for a machine that is very busy.
const RECORD_LIMIT: Duration = Duration::from_secs(60);
/// A process that ignores SIGTERM for this long gets SIGKILL.
pub const TERM_LIMIT: Duration = Duration::from_secs(10);
/// After SIGKILL only the kernel is between us and the end; a process in disk wait may take a moment.
const KILL_LIMIT: Duration = Duration::from_secs(30);
/// The longest a command that is run to its end may take: the longest build, from nothing on two busy cores,
/// took seven minutes.
const COMMAND_LIMIT: Duration = Duration::from_secs(45 * 60);
/// How soon a condition is looked at again, at first.
const POLL: Duration = Duration::from_millis(25);
/// And at last: many a look starts a process, and what takes minutes need not be seen at once.
const POLL_MAX: Duration = Duration::from_millis(250);
/// How much of a log is shown when its process fails.
const LOG_TAIL_BYTES: u64 = 3000;

/// Where a process has its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// In the lab's namespace.
    Lab,
    /// Where the caller is.
    Host,
}

/// A process by pid and by the moment it started, which together are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Process id.
    pub pid: i32,
    /// Clock ticks between boot and the start of the process (field 22 of /proc/PID/stat).
    pub start_time: u64,
}

impl Identity {
    /// The process that has `pid` now; none if there is none, or only a zombie.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, start_time) = parse_stat(&stat)?;
        (!matches!(state, 'Z' | 'X')).then_some(Self { pid, start_time })
    }

    /// Whether this very process still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal, unless the process is gone.
    pub fn signal(self, signal: Signal) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("send {signal} to process {}", self.pid)),
        }
    }

    /// Waits until the process is gone; says whether it went within `limit`.
    pub fn wait_gone(self, limit: Duration) -> bool {
        wait_until(limit, || !self.is_alive())
    }

    fn parse(text: &str) -> Option<Self> {
        let (pid, start_time) = text.trim().split_once(' ')?;
        Some(Self { pid: pid.parse().ok()?, start_time: start_time.parse().ok()? })
    }
}

/// State and start time from /proc/PID/stat. The second field, the command's name, is in parentheses and may
/// hold anything, so fields are counted from the last closing one.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?.chars().next()?;
    // `state` is field 3, the start time field 22.
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// A recorded process of the lab. Dropping it leaves the process running.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    identity: Identity,
    log: PathBuf,
    /// Present in the process that started it, which must collect its exit status.
    child: Option<Child>,
}

impl Daemon {
    /// The process's name in the lab, for instance `kube-apiserver`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who it is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        if let Some(child) = &mut self.child {
            // Collects the exit status, so that no zombie stays.
            let _ = child.try_wait();
        }
        self.identity.is_alive()
    }

    /// Waits until `ready` says so. Fails, with the end of the log, when the process ends or `limit` passes.
    pub fn wait_ready(&mut self, limit: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            if ready() {
                return Ok(());
            }
            if !self.is_alive() {
                bail!(
                    "start {}: it ended. The end of {}:\n{}",
                    self.name,
                    self.log.display(),
                    self.log_tail()
                );
            }
            if Instant::now() >= deadline {
                bail!(
                    "start {}: it was not ready within {} s. The end of {}:\n{}",
                    self.name,
                    limit.as_secs(),
                    self.log.display(),
                    self.log_tail()
                );
            }
            thread::sleep(POLL);
        }
    }

    /// The last lines of its output.
    pub fn log_tail(&self) -> String {
        let read = || -> std::io::Result<String> {
            let mut file = File::open(&self.log)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().unwrap_or_else(|error| format!("(read log: {error})"))
    }

    /// Ends it: SIGTERM, `grace`, SIGKILL; then forgets its record.
    pub fn stop(mut self, lab: &Lab, grace: Duration) -> Result<()> {
        self.identity.signal(Signal::SIGTERM)?;
        if !wait_until(grace, || !self.is_alive()) {
            self.identity.signal(Signal::SIGKILL)?;
            if !wait_until(KILL_LIMIT, || !self.is_alive()) {
                bail!("end {} (process {}): it outlived SIGKILL", self.name, self.identity.pid);
            }
        }
        files::remove_file(&record_path(lab, &self.name))
    }
}

/// The running process called `name`, if it runs.
pub fn running(lab: &Lab, name: &str) -> Option<Daemon> {
    let identity = Identity::parse(&fs::read_to_string(record_path(lab, name)).ok()?)?;
    identity.is_alive().then(|| Daemon {
        name: name.to_owned(),
        identity,
        log: log_path(lab, name),
        child: None,
    })
}

/// Every record of the lab by name, whether its process runs or not.
pub fn records(lab: &Lab) -> Result<Vec<(String, Identity)>> {
    let directory = lab.path("pids");
    let entries = match fs::read_dir(&directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("list {}", directory.display()))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("list {}", directory.display()))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        if let Some(identity) = Identity::parse(&text) {
            found.push((name, identity));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// Starts `command` as the lab's process `name`, in a session of its own so that Ctrl-C at the terminal does
/// not reach it, with its output appended to logs/NAME.log. Returns when its record is written.
///
/// Between us and `command` stands [`run_recorded`] in the same pid: it writes the record and then becomes
/// `command`, so there is no moment in which the process runs without one.
pub fn start(lab: &Lab, name: &str, network: Network, command: &Command) -> Result<Daemon> {
    let record = record_path(lab, name);
    let log = log_path(lab, name);
    for directory in [lab.path("pids"), lab.path("logs")] {
        fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    }
    let output = File::options()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("open {}", log.display()))?;
    let mut wrapper = lab_binary()?;
    wrapper.arg("__run").arg(&record).arg("--").arg(command.get_program()).args(command.get_args());
    wrapper.env(MARK, lab.dir());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => wrapper.env(key, value),
            None => wrapper.env_remove(key),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        wrapper.current_dir(directory);
    }
    wrapper.stdin(Stdio::null());
    wrapper.stdout(output.try_clone().context("share the log")?).stderr(output);
    let mut child = match network {
        Network::Host => wrapper.spawn(),
        Network::Lab => netns::within(lab, || wrapper.spawn())?,
    }
    .with_context(|| format!("start {name}"))?;
    let pid = i32::try_from(child.id()).context("read the new process's id")?;
    let deadline = Instant::now() + RECORD_LIMIT;
    loop {
        let written = fs::read_to_string(&record).ok().and_then(|text| Identity::parse(&text));
        if let Some(identity) = written.filter(|identity| identity.pid == pid) {
            return Ok(Daemon { name: name.to_owned(), identity, log, child: Some(child) });
        }
        if let Some(status) = child.try_wait().with_context(|| format!("watch {name}"))? {
            bail!("start {name}: it ended with {status} before it was recorded; see {}", log.display());
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            bail!("start {name}: it wrote no record within {} s", RECORD_LIMIT.as_secs());
        }
        thread::sleep(POLL);
    }
}

/// [`start`], unless a process of this name runs already.
pub fn ensure(
    lab: &Lab,
    name: &str,
    network: Network,
    command: impl FnOnce() -> Result<Command>,
) -> Result<Daemon> {
    match running(lab, name) {
        Some(daemon) => Ok(daemon),
        None => start(lab, name, network, &command()?),
    }
}

/// The hidden command `__run`: records this process in `record`, then becomes `command`. Returns only when
/// that fails.
pub fn run_recorded(record: &Path, command: &[std::ffi::OsString]) -> Result<()> {
    let (program, args) = command.split_first().context("name a program to run")?;
    // Fails only for a process that leads a group already, which is as good.
    let _ = setsid();
    let pid = i32::try_from(std::process::id()).context("read own process id")?;
    let own = Identity::of(pid).context("read own start time")?;
    write_atomically(record, format!("{} {}\n", own.pid, own.start_time).as_bytes())?;
    let error = Command::new(program).args(args).exec();
    Err(error).with_context(|| format!("run {}", program.display()))
}

/// Makes sure that this process, and so all that it ever starts, carries the lab's mark: becomes itself once
/// more with the mark in its environment, unless it is there.
pub fn mark_self(lab: &Lab) -> Result<()> {
    if std::env::var_os(MARK).is_some_and(|mark| mark == lab.dir().as_os_str()) {
        return Ok(());
    }
    let error =
        Command::new(SELF).arg0("howdah-lab").args(std::env::args_os().skip(1)).env(MARK, lab.dir()).exec();
    Err(error).context("start over with the lab's mark")
}

/// The processes that belong to the lab: recorded, marked, or in its network namespace, without the caller
/// and the caller's parents.
pub fn all_of(lab: &Lab) -> Result<Vec<Identity>> {
    let mark = [MARK.as_bytes(), b"=", lab.dir().as_os_str().as_bytes()].concat();
    let namespace = fs::metadata(netns::path(lab)).ok().filter(|_| netns::exists(lab)).map(inode);
    let spared = self_and_parents();
    let mut found: Vec<Identity> = records(lab)?
        .into_iter()
        .map(|(_, identity)| identity)
        .filter(|identity| identity.is_alive())
        .collect();
    for entry in fs::read_dir("/proc").context("list processes")? {
        let name = entry.context("list processes")?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Some(identity) = Identity::of(pid) else { continue };
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let marked = environment.split(|byte| *byte == 0).any(|variable| variable == mark);
        let inside =
            namespace.is_some() && fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(inode) == namespace;
        if marked || inside {
            found.push(identity);
        }
    }
    found.retain(|identity| !spared.contains(&identity.pid));
    found.sort_by_key(|identity| identity.pid);
    found.dedup();
    Ok(found)
}

/// Ends all of them at once and waits until they are gone.
pub fn kill_all(processes: &[Identity]) -> Result<()> {
    for process in processes {
        process.signal(Signal::SIGKILL)?;
    }
    let deadline = Instant::now() + KILL_LIMIT;
    for process in processes {
        if !process.wait_gone(deadline.saturating_duration_since(Instant::now())) {
            bail!("end process {}: it outlived SIGKILL for {} s", process.pid, KILL_LIMIT.as_secs());
        }
    }
    Ok(())
}

/// Runs a command to its end and gives what it printed; its error output is the error. A command that takes
/// longer than any build does is ended.
pub fn output_of(command: &mut Command) -> Result<String> {
    output_within(command, COMMAND_LIMIT)
}

/// [`output_of`] with a limit of the caller's.
pub fn output_within(command: &mut Command, limit: Duration) -> Result<String> {
    let shown = format!("{} {}", command.get_program().display(), shown_args(command));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {shown}"))?;
    // Read on threads of their own, or a full pipe would stop the command.
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let mut status = None;
    let ended = wait_until(limit, || {
        status = child.try_wait().transpose();
        status.is_some()
    });
    if !ended {
        // Not waited for its output: a child of its own may hold the pipes open.
        let _ = child.kill();
        let _ = child.wait();
        bail!("run {shown}: it did not end within {} s", limit.as_secs());
    }
    let status = status.context("read the exit status")?.with_context(|| format!("wait for {shown}"))?;
    let read = |reader: JoinHandle<Vec<u8>>| {
        let bytes = reader.join().map_err(|_| anyhow!("read the output of {shown}"))?;
        Ok::<_, anyhow::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    let (stdout, stderr) = (read(stdout)?, read(stderr)?);
    if !status.success() {
        bail!("run {shown}: {status}: {}", stderr.trim());
    }
    Ok(stdout)
}

/// The same command, killed as soon as the thread that starts it is gone: for what would go on to write where the next one
/// begins anew.
pub fn ends_with_its_starter(command: &Command) -> Command {
    let mut bound = Command::new("setpriv");
    bound.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bound.env(name, value),
            None => bound.env_remove(name),
        };
    }
    bound
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What came before a read error is still worth showing.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// Polls `condition` until it holds; says whether it did within `limit`.
pub fn wait_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    wait_some(limit, || condition().then_some(())).is_some()
}

/// Polls `look` until it gives something; gives nothing when it did not within `limit`. The longer it has taken, the less
/// often.
pub fn wait_some<T>(limit: Duration, look: impl FnMut() -> Option<T>) -> Option<T> {
    poll(limit, POLL, POLL_MAX, look)
}

/// The same with a pause of at least `least` and at most `most` between two looks.
pub fn poll<T>(
    limit: Duration,
    least: Duration,
    most: Duration,
    mut look: impl FnMut() -> Option<T>,
) -> Option<T> {
    let begun = Instant::now();
    loop {
        let found = look();
        let passed = begun.elapsed();
        if found.is_some() || passed >= limit {
            return found;
        }
        // What was waited for is seen a tenth of the time too late at most.
        thread::sleep((passed / 10).clamp(least, most));
    }
}

/// Writes a file so that a reader, or a crash, sees either all of it or the old one.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    fs::write(&temporary, bytes).with_context(|| format!("write {}", temporary.display()))?;
    fs::rename(&temporary, path).with_context(|| format!("write {}", path.display()))
}

/// The `howdah-lab` binary: this process's own, or, in a test, the one that cargo built beside the tests.
pub fn lab_binary() -> Result<Command> {
    let own = std::env::current_exe().context("find own binary")?;
    let mut command = if own.file_name().is_some_and(|name| name.to_string_lossy().starts_with("howdah-lab"))
    {
        Command::new(SELF)
    } else {
        // A test is one folder below the binaries, a program stands beside them.
        let mut beside = own.ancestors().skip(1).take(2).map(|directory| directory.join("howdah-lab"));
        let built = beside.find(|path| path.is_file()).with_context(|| {
            format!("find howdah-lab beside {}; build it: cargo build -p howdah-lab", own.display())
        })?;
        Command::new(built)
    };
    command.arg0("howdah-lab");
    Ok(command)
}

fn record_path(lab: &Lab, name: &str) -> PathBuf {
    lab.path("pids").join(name)
}

/// Where the output of the process of this name goes; it outlives the process.
pub fn log_path(lab: &Lab, name: &str) -> PathBuf {
    lab.path("logs").join(format!("{name}.log"))
}

fn shown_args(command: &Command) -> String {
    command.get_args().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn inode(metadata: fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&metadata)
}

fn self_and_parents() -> Vec<i32> {
    // More generations than any real process has; a bound, because /proc changes while we read it.
    const GENERATIONS_MAX: usize = 64;
    let mut found = Vec::new();
    let mut pid = i32::try_from(std::process::id()).unwrap_or_default();
    while pid > 1 && found.len() < GENERATIONS_MAX {
        found.push(pid);
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        pid = parent.unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_bound_ends_with_the_thread_that_started_it() {
        let started = thread::spawn(|| {
            let child = ends_with_its_starter(Command::new("sleep").arg("600")).spawn().unwrap();
            // It binds itself once it runs.
            thread::sleep(Duration::from_millis(500));
            child
        });
        let mut child = started.join().unwrap();
        let ended = wait_until(KILL_LIMIT, || child.try_wait().unwrap().is_some());
        child.kill().unwrap();
        assert!(ended, "it outlived its starter");
    }

    #[test]
    fn a_command_name_with_parentheses_does_not_shift_the_fields() {
        let mut stat = String::from("7 (a) b (c) S 1 7 7 0 -1 0 0 0 0 0 1 2 0 0 20 0 1 0 4242 0 0");
        assert_eq!(parse_stat(&stat), Some(('S', 4242)));
        stat.truncate(20);
        assert_eq!(parse_stat(&stat), None);
    }

    #[test]
    fn a_command_is_ended_at_its_limit_and_its_error_is_told() {
        let limit = Duration::from_millis(200);
        let slow = output_within(Command::new("sleep").arg("60"), limit).unwrap_err().to_string();
        assert!(slow.contains("run sleep 60: it did not end"), "{slow}");
        let failed = output_of(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        assert!(failed.to_string().ends_with("exit status: 3: why"), "{failed}");
        let large = output_of(Command::new("head").args(["-c", "1000000", "/dev/zero"])).unwrap();
        assert_eq!(large.len(), 1_000_000);
    }

    #[test]
    fn a_reused_pid_is_not_the_same_process() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let real = Identity::of(pid).unwrap();
        let other = Identity { start_time: real.start_time + 1, ..real };
        other.signal(Signal::SIGKILL).unwrap();
        assert!(real.is_alive() && !other.is_alive());
        real.signal(Signal::SIGKILL).unwrap();
        assert!(real.wait_gone(Duration::from_secs(5)), "a zombie counts as gone");
        child.wait().unwrap();
    }
}
