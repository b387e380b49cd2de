//! Reading a Dockerfile: its final stage, in the instructions the lab can follow. The same file must also
//! build with a real container engine, so what is understood here means what it means there, and anything
//! else is an error and never a guess.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Where an instruction stands, for errors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    file: PathBuf,
    line: usize,
    instruction: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.instruction)
    }
}

/// What the final stage starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// `debian:bookworm-slim`.
    Debian,
    /// `scratch`: an empty tree.
    Scratch,
}

/// What changes the image's tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// A command for the image's own shell (or its argv), in the environment and as the user given.
    Run {
        /// argv.
        command: Vec<String>,
        /// Environment, `NAME=value`, in the order of the file.
        environment: Vec<String>,
        /// Directory it runs in.
        directory: String,
        /// `UID[:GID]` or names known in the image; empty for root.
        user: String,
    },
    /// Files from the build context or from another stage.
    Copy {
        /// The stage's name; none for the build context.
        stage: Option<String>,
        /// Paths there.
        sources: Vec<String>,
        /// Path in the image; a folder if it ends in `/`.
        target: String,
        /// Octal permissions for every file, if given.
        mode: Option<String>,
    },
    /// Makes the working directory if it is missing.
    Directory(String),
}

/// What a container of the image gets from it; OCI's words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `NAME=value`, in the order of the file.
    pub environment: Vec<String>,
    /// argv's beginning.
    pub entrypoint: Option<Vec<String>>,
    /// argv's rest, which a pod may replace.
    pub command: Option<Vec<String>>,
    /// User, empty for root.
    pub user: String,
    /// Working directory.
    pub directory: String,
    /// `PORT/PROTOCOL`.
    pub ports: Vec<String>,
    /// Volumes.
    pub volumes: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// The signal that asks the process to end; the runtime's default is SIGTERM.
    pub stop_signal: Option<String>,
}

/// The final stage of a Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// What it starts from.
    pub base: Base,
    /// Changes to the tree, in order.
    pub actions: Vec<(Place, Action)>,
    /// The container's settings.
    pub settings: Settings,
}

/// The path of a new container, as every engine sets it where the image does not.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Reads the final stage of `text`, the Dockerfile at `file`.
pub fn parse(file: &Path, text: &str) -> Result<Stage> {
    let instructions = instructions(text);
    let last = instructions
        .iter()
        .rposition(|(_, words)| is(words, "FROM"))
        .with_context(|| format!("read {}: it has no FROM", file.display()))?;
    let mut stage = Stage { base: Base::Scratch, actions: Vec::new(), settings: Settings::default() };
    stage.settings.environment.push(format!("PATH={DEFAULT_PATH}"));
    for (line, text) in &instructions[last..] {
        let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let place = Place { file: file.to_owned(), line: *line, instruction: name.to_ascii_uppercase() };
        stage.follow(&place, rest.trim()).with_context(|| place.to_string())?;
    }
    Ok(stage)
}

fn is(text: &str, name: &str) -> bool {
    text.split_whitespace().next().is_some_and(|word| word.eq_ignore_ascii_case(name))
}

/// Logical lines: comments and empty lines dropped, continued lines joined, each with the number of its first.
fn instructions(text: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (index, line) in text.lines().enumerate() {
        let trimmed = line.trim();
        // Comments vanish also between the lines of one instruction.
        if trimmed.starts_with('#') || (trimmed.is_empty() && open.is_none()) {
            continue;
        }
        let (part, continued) = match trimmed.strip_suffix('\\') {
            Some(part) => (part, true),
            None => (trimmed, false),
        };
        let (_, whole) = open.get_or_insert_with(|| (index + 1, String::new()));
        if !whole.is_empty() {
            whole.push(' ');
        }
        whole.push_str(part.trim());
        if !continued {
            found.extend(open.take());
        }
    }
    found.extend(open);
    found
}

impl Stage {
    fn follow(&mut self, place: &Place, rest: &str) -> Result<()> {
        if rest.is_empty() {
            bail!("give it an argument");
        }
        match place.instruction.as_str() {
            "FROM" => {
                self.base = match rest.split_whitespace().next() {
                    Some("debian:bookworm-slim") => Base::Debian,
                    Some("scratch") => Base::Scratch,
                    _ => bail!("the lab can start from debian:bookworm-slim or scratch, not from {rest:?}"),
                };
            }
            "RUN" => {
                if rest.starts_with("--") || rest.contains("<<") {
                    bail!("flags and here-documents are not understood: {rest:?}");
                }
                let action = Action::Run {
                    command: self.argv(rest)?,
                    environment: self.settings.environment.clone(),
                    directory: self.directory().to_owned(),
                    user: self.settings.user.clone(),
                };
                self.actions.push((place.clone(), action));
            }
            "COPY" => {
                let action = self.copy(rest)?;
                self.actions.push((place.clone(), action));
            }
            "WORKDIR" => {
                let path = self.absolute(&self.expand(rest)?);
                self.actions.push((place.clone(), Action::Directory(path.clone())));
                self.settings.directory = path;
            }
            "ENV" => {
                for (name, value) in pairs(rest)? {
                    let value = self.expand(&value)?;
                    self.settings.environment.retain(|known| !known.starts_with(&format!("{name}=")));
                    self.settings.environment.push(format!("{name}={value}"));
                }
            }
            "LABEL" => {
                for (name, value) in pairs(rest)? {
                    self.settings.labels.insert(name, self.expand(&value)?);
                }
            }
            "USER" => self.settings.user = self.expand(rest)?,
            "ENTRYPOINT" => {
                self.settings.entrypoint = Some(self.argv(rest)?);
                // As in a real engine: a new entry point makes an inherited command meaningless.
                self.settings.command = None;
            }
            "CMD" => self.settings.command = Some(self.argv(rest)?),
            "EXPOSE" => {
                for port in self.expand(rest)?.split_whitespace() {
                    let full = if port.contains('/') { port.to_owned() } else { format!("{port}/tcp") };
                    self.settings.ports.push(full);
                }
            }
            "VOLUME" => {
                let paths = match json(rest)? {
                    Some(paths) => paths,
                    None => rest.split_whitespace().map(str::to_owned).collect(),
                };
                for path in paths {
                    self.settings.volumes.push(self.expand(&path)?);
                }
            }
            "STOPSIGNAL" => self.settings.stop_signal = Some(rest.to_owned()),
            _ => bail!(
                "the lab does not follow this instruction; it knows FROM, RUN, COPY, WORKDIR, ENV, LABEL, USER, \
                 ENTRYPOINT, CMD, EXPOSE, VOLUME and STOPSIGNAL"
            ),
        }
        Ok(())
    }

    fn directory(&self) -> &str {
        if self.settings.directory.is_empty() { "/" } else { &self.settings.directory }
    }

    fn absolute(&self, path: &str) -> String {
        if path.starts_with('/') {
            return path.to_owned();
        }
        format!("{}/{path}", self.directory().trim_end_matches('/'))
    }

    /// The exec form as it stands, or the shell form under a shell.
    fn argv(&self, rest: &str) -> Result<Vec<String>> {
        Ok(json(rest)?.unwrap_or_else(|| ["/bin/sh", "-c", rest].map(str::to_owned).to_vec()))
    }

    fn copy(&self, rest: &str) -> Result<Action> {
        let (mut stage, mut mode) = (None, None);
        let mut paths = Vec::new();
        for word in rest.split_whitespace() {
            if let Some(name) = word.strip_prefix("--from=") {
                stage = Some(name.to_owned());
            } else if let Some(bits) = word.strip_prefix("--chmod=") {
                if bits.is_empty() || !bits.bytes().all(|digit| digit.is_ascii_digit() && digit < b'8') {
                    bail!("give --chmod in octal digits: it is {bits:?}");
                }
                mode = Some(bits.to_owned());
            } else if word.starts_with("--") {
                bail!("the flag {word} is not understood; --from and --chmod are");
            } else if word.contains(['*', '?', '[', '"']) {
                bail!("patterns and the JSON form are not understood: {word:?}");
            } else {
                paths.push(self.expand(word)?);
            }
        }
        let target = match paths.pop() {
            Some(target) if !paths.is_empty() => target,
            _ => bail!("give one source at least, and a target"),
        };
        if paths.len() > 1 && !target.ends_with('/') {
            bail!("end the target in / when there are several sources: it is {target:?}");
        }
        if let Some(path) = paths.iter().find(|path| path.split('/').any(|part| part == "..")) {
            bail!("a source must not leave its root: {path:?}");
        }
        // "." and a trailing "/." name a folder too.
        let folder = target == "." || target.ends_with("/.");
        let mut target = self.absolute(&target);
        if folder && !target.ends_with('/') {
            target.push('/');
        }
        Ok(Action::Copy { stage, sources: paths, target, mode })
    }

    /// Replaces `$NAME` and `${NAME}` by what ENV has set.
    fn expand(&self, text: &str) -> Result<String> {
        let mut result = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('$') {
            result.push_str(before);
            let (name, next) = match after.strip_prefix('{') {
                Some(braced) => braced.split_once('}').context("close the brace of ${")?,
                None => {
                    let end = after.find(|c: char| c != '_' && !c.is_ascii_alphanumeric());
                    after.split_at(end.unwrap_or(after.len()))
                }
            };
            let known = self.settings.environment.iter().find_map(|pair| {
                pair.split_once('=').filter(|(known, _)| *known == name).map(|(_, value)| value)
            });
            match known {
                Some(value) => result.push_str(value),
                None => bail!("set {name:?} with ENV in this stage before it is used (in {text:?})"),
            }
            rest = next;
        }
        result.push_str(rest);
        Ok(result)
    }
}

/// The exec form, `["a", "b"]`; none if it is not one.
fn json(rest: &str) -> Result<Option<Vec<String>>> {
    if !rest.starts_with('[') {
        return Ok(None);
    }
    serde_json::from_str(rest).map(Some).with_context(|| format!("read {rest:?} as a JSON list of texts"))
}

/// `a=b c="d e"`, each value unquoted.
fn pairs(rest: &str) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let mut characters = rest.chars().peekable();
    loop {
        while characters.next_if(|c| c.is_whitespace()).is_some() {}
        if characters.peek().is_none() {
            return Ok(found);
        }
        let mut name = String::new();
        while let Some(c) = characters.next_if(|c| *c != '=' && !c.is_whitespace()) {
            name.push(c);
        }
        if characters.next() != Some('=') {
            bail!("write NAME=value: {rest:?}");
        }
        let mut value = String::new();
        let mut quote = None;
        while let Some(c) = characters.next_if(|c| quote.is_some() || !c.is_whitespace()) {
            match c {
                '"' | '\'' if quote.is_none() => quote = Some(c),
                _ if quote == Some(c) => quote = None,
                '\\' => value.extend(characters.next()),
                _ => value.push(c),
            }
        }
        if quote.is_some() {
            bail!("close the quote in {rest:?}");
        }
        found.push((name.trim_matches('"').to_owned(), value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Stage> {
        parse(Path::new("a/Dockerfile"), text)
    }

    #[test]
    fn the_final_stage_alone_is_followed() {
        let stage = read(
            "# syntax\nFROM rust:1 AS build\nRUN cargo build\nONBUILD RUN x\n\nFROM debian:bookworm-slim\n\
             ENV A=1 B=\"two words\" PATH=/opt/bin:$PATH\n\
             # between\nRUN apt-get update \\\n  # inside\n  && true\nWORKDIR /srv\nWORKDIR data\n\
             COPY --from=build --chmod=0755 /src/x ${A}/y /bin/\nEXPOSE 80 53/udp\nUSER 65532:65532\n\
             CMD [\"a\"]\nENTRYPOINT [\"/bin/x\", \"-v\"]\nVOLUME /data\nLABEL k=v\nSTOPSIGNAL SIGINT\n",
        )
        .unwrap();
        assert_eq!(stage.base, Base::Debian);
        let environment =
            vec![String::from("A=1"), "B=two words".into(), format!("PATH=/opt/bin:{DEFAULT_PATH}")];
        assert_eq!(stage.settings.environment, environment);
        assert_eq!(stage.settings.directory, "/srv/data");
        assert_eq!(stage.settings.ports, ["80/tcp", "53/udp"]);
        assert_eq!(stage.settings.command, None, "ENTRYPOINT resets CMD");
        assert_eq!(stage.settings.entrypoint.unwrap(), ["/bin/x", "-v"]);
        assert_eq!(stage.settings.stop_signal.as_deref(), Some("SIGINT"));
        let (place, run) = &stage.actions[0];
        assert_eq!(place.to_string(), "a/Dockerfile:9: RUN");
        let command = ["/bin/sh", "-c", "apt-get update && true"].map(str::to_owned).to_vec();
        assert_eq!(*run, Action::Run { command, environment, directory: "/".into(), user: String::new() });
        let copy = Action::Copy {
            stage: Some("build".into()),
            sources: vec!["/src/x".into(), "1/y".into()],
            target: "/bin/".into(),
            mode: Some("0755".into()),
        };
        assert_eq!(stage.actions[3].1, copy);
    }

    #[test]
    fn what_is_not_understood_is_named_with_file_line_and_instruction() {
        for (line, problem) in [
            ("HEALTHCHECK CMD true", "does not follow"),
            ("ARG X=1", "does not follow"),
            ("ADD a b", "does not follow"),
            ("FROM alpine:3", "not from \"alpine:3\""),
            ("RUN --mount=type=cache,target=/x true", "flags"),
            ("RUN cat <<EOF", "here-documents"),
            ("COPY a", "a target"),
            ("COPY a b c", "end the target in /"),
            ("COPY *.txt /x/", "patterns"),
            ("COPY --chown=1 a b", "--chown=1"),
            ("COPY ../a b", "leave its root"),
            ("COPY --chmod=u+x a b", "octal"),
            ("ENV A", "NAME=value"),
            ("ENV A=\"b", "close the quote"),
            ("USER $NOBODY", "\"NOBODY\""),
            ("CMD [\"a\", 1]", "JSON"),
            ("RUN", "argument"),
        ] {
            let error = format!("{:#}", read(&format!("FROM scratch\n\n{line}\n")).unwrap_err());
            let instruction = line.split(' ').next().unwrap();
            assert!(error.contains(&format!("a/Dockerfile:3: {instruction}")), "{error}");
            assert!(error.contains(problem), "{line}: {error}");
        }
    }
}
