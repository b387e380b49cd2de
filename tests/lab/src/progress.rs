//! Progress lines on stderr: what the lab is doing and how long it has taken, so that nobody stares at a
//! silent terminal while a binary is built for minutes.

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How often a slow step says that it is still alive: often enough to be believed, rare enough for a CI log.
const HEARTBEAT: Duration = Duration::from_secs(20);

fn started() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// Prints one line with the time since this process first printed.
pub fn say(line: impl AsRef<str>) {
    let seconds = started().elapsed().as_secs_f64();
    let line = line.as_ref();
    if std::io::stderr().is_terminal() {
        eprintln!("\x1b[2m[{seconds:6.1}s]\x1b[0m {line}");
    } else {
        eprintln!("[{seconds:6.1}s] {line}");
    }
}

/// Runs a step that takes seconds: says when it is done and how long it took. Nothing is said of a failure
/// here, because the error that comes back says it.
pub fn step<T, E>(what: &str, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    started();
    let begin = Instant::now();
    let result = work();
    if result.is_ok() {
        say(format!("{what} ({:.1} s)", begin.elapsed().as_secs_f64()));
    }
    result
}

/// Runs a step that may take minutes: announces it, says every 20 s that it still runs, and reports its end.
pub fn slow<T, E>(what: &str, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    say(format!("{what} ..."));
    let begin = Instant::now();
    let (done, wait) = channel::<()>();
    let result = thread::scope(|scope| {
        scope.spawn(move || {
            while wait.recv_timeout(HEARTBEAT) == Err(RecvTimeoutError::Timeout) {
                say(format!("{what} ... still at it after {} s", begin.elapsed().as_secs()));
            }
        });
        let result = work();
        drop(done);
        result
    });
    if result.is_ok() {
        say(format!("{what}: done ({:.1} s)", begin.elapsed().as_secs_f64()));
    }
    result
}
