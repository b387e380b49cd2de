//! A gate in the way of the scheduler's `rbd`: the real command, which a test holds before it begins or after it has ended.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use howdah_lab::files;
use howdah_lab::process::wait_until;
use howdah_lab::stage::{BACKUP_LIMIT, Stage};

/// In the place of `rbd`. One whose caller has died goes without doing anything more.
const SCRIPT: &str = r#"#!/bin/bash
folder=$(dirname "$0")
when= what=
[ -f "$folder/closed" ] && read -r when what <"$folder/closed"
alive() { kill -0 "$PPID" 2>/dev/null; }
hold() {
    : >"$folder/reached"
    while [ -f "$folder/closed" ] && alive; do sleep 0.05; done
    alive || exit 1
}
meant=
[[ -n $what && " $* " == *" $what "* ]] && meant=yes
[[ $meant && $when == before ]] && hold
PATH=${PATH#"$folder":} rbd "$@"
code=$?
[[ $meant && $when == after ]] && hold
exit $code
"#;

/// Where a command is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// It has not begun.
    Before,
    /// It has done its work, and its caller does not know.
    After,
}

/// The gate; open until it is closed.
pub struct Gate {
    folder: PathBuf,
}

impl Gate {
    pub fn new(stage: &Stage) -> Self {
        let folder = stage.lab.path("gate");
        files::remove_tree(&folder).unwrap();
        fs::create_dir_all(&folder).unwrap();
        let script = folder.join("rbd");
        fs::write(&script, SCRIPT).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        Self { folder }
    }

    /// The `PATH` of a scheduler that is to come by it.
    pub fn path(&self) -> String {
        format!("{}:{}", self.folder.display(), std::env::var("PATH").unwrap())
    }

    /// From now on holds the commands with these words in a row.
    pub fn close(&self, when: When, what: &str) {
        let when = if when == When::Before { "before" } else { "after" };
        // Whole or not at all: a command may look at any moment.
        let new = self.folder.join("new");
        fs::write(&new, format!("{when} {what}\n")).unwrap();
        fs::rename(new, self.folder.join("closed")).unwrap();
    }

    /// Waits until a command is held.
    pub fn wait_reached(&self) {
        let reached = self.folder.join("reached");
        assert!(wait_until(BACKUP_LIMIT, || reached.is_file()), "no command came to the gate");
    }

    /// Lets go what is held.
    pub fn open(&self) {
        files::remove_file(&self.folder.join("closed")).unwrap();
        files::remove_file(&self.folder.join("reached")).unwrap();
    }
}
