//! `kubectl howdah lint` as the built command, with no cluster anywhere: what it reads, prints and exits with.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

const GOOD: &str = r#"apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, labels: {howdah.dev/protect: "true"}}
spec:
  replicas: 1
"#;

struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

fn lint(folder: &Path, arguments: &[&str], stdin: &str) -> Ended {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kubectl-howdah"))
        .arg("lint")
        .args(arguments)
        .current_dir(folder)
        // Nothing that could lead it to a cluster.
        .env("KUBECONFIG", "/nonexistent")
        .env("HOME", "/nonexistent")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that ends before it has read everything closes the pipe.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ended { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[test]
fn files_folders_and_standard_input_are_read_and_the_exit_code_tells() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    std::fs::create_dir(folder.path().join("app")).unwrap();
    write("app/db.yaml", GOOD);
    let clean = lint(folder.path(), &["app"], "");
    assert_eq!((clean.code, clean.stderr.as_str()), (0, ""), "{}", clean.stdout);
    assert!(clean.stdout.starts_with("1 file: 1 StatefulSet judged"), "{}", clean.stdout);

    write("app/other.yaml", &GOOD.replace("replicas: 1", "replicas: 2"));
    let denied = lint(folder.path(), &["app"], "");
    assert_eq!(denied.code, 1);
    assert!(denied.stdout.contains("app/other.yaml:5: denied [single-replica]"), "{}", denied.stdout);
    assert_eq!(lint(folder.path(), &["app/db.yaml"], "").code, 0);

    let piped = lint(folder.path(), &["-"], &GOOD.replace("replicas: 1", "replicas: 2"));
    assert_eq!(piped.code, 1);
    assert!(piped.stdout.starts_with("-:5: denied [single-replica]"), "{}", piped.stdout);

    write("app/broken.yaml", "spec: [");
    let broken = lint(folder.path(), &["app"], "");
    assert_eq!(broken.code, 2, "what could not be read weighs more than what is denied");
    assert!(broken.stdout.contains("app/broken.yaml, document 1"), "{}", broken.stdout);
    assert!(broken.stdout.contains("[single-replica]"), "the rest is judged: {}", broken.stdout);
    assert_eq!(lint(folder.path(), &["absent.yaml"], "").code, 2);
}

#[test]
fn a_wrong_call_and_a_cluster_that_is_not_there_end_with_two() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [&[][..], &["-", "--output", "xml"], &["-", "--minimum-grace-seconds", "0"]] {
        assert_eq!(lint(folder.path(), arguments, GOOD).code, 2, "{arguments:?}");
    }
    let unreachable = lint(folder.path(), &["-", "--cluster"], GOOD);
    assert_eq!((unreachable.code, unreachable.stdout.as_str()), (2, ""));
    assert!(unreachable.stderr.starts_with("error: reach the cluster"), "{}", unreachable.stderr);
}

#[test]
fn the_patch_is_all_that_goes_to_standard_output() {
    let folder = tempfile::tempdir().unwrap();
    let printed = lint(folder.path(), &["-", "--print-patch"], &GOOD.replace("replicas: 1", "replicas: 2"));
    assert_eq!(printed.code, 1);
    assert!(printed.stdout.starts_with("---\n# -, document 1\napiVersion: apps/v1\n"), "{}", printed.stdout);
    assert!(printed.stdout.contains("terminationGracePeriodSeconds: 300"), "{}", printed.stdout);
    assert!(printed.stderr.contains("[single-replica]"), "{}", printed.stderr);
}
