//! How the demo speaks: chapters, commands as a user would type them, what they answered, and one line of
//! progress for what takes long. Colour and moving lines only where a human looks.

use std::io::{IsTerminal, Write, stdout};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a waiting step looks again: the API server and a human both think this is often.
const POLL: Duration = Duration::from_millis(500);

/// Tells one story on stdout.
#[derive(Debug)]
pub struct Story {
    colour: bool,
    live: bool,
    chapter: usize,
    chapters: usize,
    begin: Instant,
}

#[derive(Clone, Copy)]
enum Paint {
    Bold,
    Dim,
    Green,
    Red,
    Cyan,
}

impl Story {
    /// A story of `chapters` chapters. Colour follows <https://no-color.org>; without a terminal there is
    /// none, and progress is one line at its end.
    pub fn new(chapters: usize) -> Self {
        let live = stdout().is_terminal();
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colour: live && !no_colour, live, chapter: 0, chapters, begin: Instant::now() }
    }

    /// Begins the next chapter.
    pub fn chapter(&mut self, title: &str) {
        self.chapter += 1;
        let heading = format!("{}/{}  {title}", self.chapter, self.chapters);
        self.line(&format!("\n{}", self.paint(Paint::Bold, &heading)));
    }

    /// A sentence that explains.
    pub fn say(&self, text: &str) {
        self.line(&format!("  {text}"));
    }

    /// A command, as a user would type it.
    pub fn command(&self, command: &str) {
        self.line(&format!("  {} {}", self.paint(Paint::Dim, "$"), self.paint(Paint::Cyan, command)));
    }

    /// What a command answered.
    pub fn output(&self, text: &str) {
        for line in text.trim_end().lines() {
            self.line(&format!("  {line}"));
        }
    }

    /// What a command answered when howdah said no.
    pub fn refusal(&self, text: &str) {
        for line in text.trim_end().lines() {
            self.line(&format!("  {}", self.paint(Paint::Red, line)));
        }
    }

    /// A fact that the demo has checked, not only shown.
    pub fn proven(&self, text: &str) {
        self.line(&format!("  {} {text}", self.paint(Paint::Green, "✓")));
    }

    /// Looks every half second until `look` finds something, for at most `limit`; the error of a wait that
    /// found nothing carries the last thing `look` had to say.
    pub fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut() -> Result<Look<T>>,
    ) -> Result<T> {
        let begin = Instant::now();
        loop {
            let last = match look()? {
                Look::Found(found) => {
                    self.clear();
                    self.proven(&format!("{what} ({:.0} s)", begin.elapsed().as_secs_f64()));
                    return Ok(found);
                }
                Look::NotYet(last) => last,
            };
            let elapsed = begin.elapsed();
            if elapsed > limit {
                self.clear();
                bail!("wait for this: {what}: not after {} s; last seen: {last}", limit.as_secs());
            }
            if self.live {
                let line = format!("  … {what}: {} s  {}", elapsed.as_secs(), first_line(&last));
                print!("\r\x1b[2K{}", self.paint(Paint::Dim, &line));
                // A progress line that cannot be shown is no reason to stop.
                let _ = stdout().flush();
            }
            thread::sleep(POLL);
        }
    }

    /// Time since the story began.
    pub fn elapsed(&self) -> Duration {
        self.begin.elapsed()
    }

    fn clear(&self) {
        if self.live {
            print!("\r\x1b[2K");
        }
    }

    fn line(&self, text: &str) {
        println!("{text}");
    }

    fn paint(&self, paint: Paint, text: &str) -> String {
        if !self.colour {
            return text.to_owned();
        }
        let code = match paint {
            Paint::Bold => 1,
            Paint::Dim => 2,
            Paint::Red => 31,
            Paint::Green => 32,
            Paint::Cyan => 36,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// One look at something awaited.
#[derive(Debug)]
pub enum Look<T> {
    /// It is there.
    Found(T),
    /// It is not there yet; what was seen instead.
    NotYet(String),
}

/// The part of a long answer that fits one line of a terminal.
fn first_line(text: &str) -> String {
    const WIDTH: usize = 60;
    text.lines().next().unwrap_or_default().chars().take(WIDTH).collect()
}
