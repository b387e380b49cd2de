//! What the machine lacks is named with the command that cures it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use howdah_lab::process::lab_binary;

use crate::lab_beside;

fn refusal(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn every_missing_package_is_named_with_its_cure() {
    // dpkg reads its database where this variable says; an empty one is a machine with nothing installed.
    let database = tempfile::tempdir().unwrap();
    fs::write(database.path().join("status"), "").unwrap();
    let mut up = lab_binary().unwrap();
    up.args(["--name", lab_beside("bare").name(), "up", "--without-ceph"])
        .env("DPKG_ADMINDIR", database.path());
    let message = refusal(&mut up);
    assert!(message.contains("make setup") && message.contains("apt-get install -y"), "{message}");
    for package in ["ceph-osd", "iproute2"] {
        assert!(message.contains(package), "{message}");
    }
}

#[test]
fn without_roots_rights_it_says_so() {
    // A copy where everybody may run it: a clone may lie in a home that is closed to others.
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let binary = place.path().join("howdah-lab");
    fs::copy(lab_binary().unwrap().get_program(), &binary).unwrap();
    let mut as_nobody = Command::new("setpriv");
    as_nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(binary);
    as_nobody.args(["--name", lab_beside("nobody").name(), "up", "--without-ceph"]);
    let message = refusal(&mut as_nobody);
    assert!(message.contains("root's rights") && message.contains("sudo"), "{message}");
}
