//! `down` leaves nothing, whatever state `up` was in when it died.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use howdah_lab::lab::Lab;
use howdah_lab::netns;
use howdah_lab::process::{Network, lab_binary, output_of, running, start, wait_until};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::lab_beside;

/// When `up` is killed, in milliseconds after its start: while it makes the namespace, the stores, the first
/// processes, and the last ones.
const KILL_AFTER_MS: [u64; 7] = [10, 60, 150, 400, 1000, 2200, 4500];

/// Until a node is started; what it is made of may have to be built first, from nothing.
const NODE_LIMIT: Duration = Duration::from_secs(40 * 60);

/// Takes a lab down and insists that it worked.
pub fn down(lab: &Lab) {
    let output = lab_binary().unwrap().args(["--name", lab.name(), "down"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Looks for traces with none of the lab's own code: its path in any process, mount or loop device, its
/// namespace, its files.
pub fn assert_nothing_left(lab: &Lab) {
    let directory = lab.dir().to_str().unwrap();
    let own = std::process::id().to_string();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let pid = entry.file_name().into_string().unwrap();
        if pid == own || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        for file in ["cmdline", "environ"] {
            let text = fs::read(entry.path().join(file)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let traces = text
                .split('\0')
                .any(|part| part.contains(&format!("{directory}/")) || part.ends_with(directory));
            assert!(!traces, "process {pid} is left: {text}");
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&format!("{directory}/")), "a mount is left:\n{mounts}");
    let loops = output_of(Command::new("losetup").arg("--list")).unwrap();
    assert!(!loops.contains(&format!("{directory}/")), "a loop device is left:\n{loops}");
    let namespaces = output_of(Command::new("ip").args(["netns", "list"])).unwrap();
    let netns = lab.netns();
    assert!(!namespaces.lines().any(|line| line.split(' ').next() == Some(&netns)), "{namespaces}");
    assert!(!Path::new("/run/netns").join(&netns).exists());
    assert!(!lab.dir().exists());
    assert!(!lab.dir().with_extension("lock").exists());
}

/// `up` in a process group of its own and not ignoring Ctrl-C, as a shell would start it, whoever started this test.
fn start_up(lab: &Lab, cache: Option<&Path>) -> Child {
    let mut up = Command::new("env");
    up.arg("--default-signal=INT").arg(lab_binary().unwrap().get_program());
    up.args(["--name", lab.name(), "up"]).process_group(0).stdin(Stdio::null());
    if let Some(cache) = cache {
        up.env("HOWDAH_CACHE", cache);
    }
    up.spawn().unwrap()
}

fn group(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap())
}

#[test]
fn down_after_a_kill_of_up_at_any_moment_leaves_nothing() {
    let lab = lab_beside("kill");
    for delay in KILL_AFTER_MS {
        let mut up = start_up(&lab, None);
        sleep(Duration::from_millis(delay));
        up.kill().unwrap();
        up.wait().unwrap();
        down(&lab);
        assert_nothing_left(&lab);
    }
}

#[test]
fn down_after_a_kill_of_up_while_a_node_boots_leaves_nothing() {
    let lab = lab_beside("boot");
    let mut up = lab_binary().unwrap();
    let mut up = up.args(["--name", lab.name(), "up", "--nodes", "1"]).stdin(Stdio::null()).spawn().unwrap();
    let boots = || running(&lab, "node-1").is_some() || up.try_wait().unwrap().is_some();
    assert!(wait_until(NODE_LIMIT, boots), "no node was started");
    assert!(up.try_wait().unwrap().is_none(), "up ended before it was killed");
    // Its kernel is up by then, and kubelet is not.
    sleep(Duration::from_secs(5));
    up.kill().unwrap();
    up.wait().unwrap();
    assert!(running(&lab, "node-1").is_some(), "the node's machine ended by itself: the test proves nothing");
    down(&lab);
    assert_nothing_left(&lab);
}

#[test]
fn up_completes_what_a_killed_up_began_and_ctrl_c_leaves_it_to_down() {
    let lab = lab_beside("resume");
    for delay in [300, 1500] {
        let mut up = start_up(&lab, None);
        sleep(Duration::from_millis(delay));
        up.kill().unwrap();
        up.wait().unwrap();
    }
    let mut up = start_up(&lab, None);
    sleep(Duration::from_millis(700));
    killpg(group(&up), Signal::SIGINT).unwrap();
    assert!(!up.wait().unwrap().success());

    let mut up = start_up(&lab, None);
    assert!(up.wait().unwrap().success(), "up could not complete what was there");
    lab.kubectl_ok(&["get", "--raw", "/readyz"]).unwrap();
    lab.rbd(&["create", "--size", "16M", "replicapool/a"]).unwrap();
    down(&lab);
    assert_nothing_left(&lab);
    down(&lab);
}

#[test]
fn down_removes_mounts_loop_devices_taps_and_processes_nobody_recorded() {
    let lab = lab_beside("strays");
    fs::create_dir_all(lab.path("mount")).unwrap();
    netns::create(&lab).unwrap();
    netns::within(&lab, || output_of(Command::new("ip").args(["tuntap", "add", "tap-stray", "mode", "tap"])))
        .unwrap()
        .unwrap();
    let mount = lab.path("mount");
    for _ in 0..2 {
        output_of(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&mount)).unwrap();
    }
    let disk = mount.join("disk");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    output_of(Command::new("losetup").arg("--find").arg(&disk)).unwrap();
    // One without a mark, found by its namespace; one outside, found by its mark; one that holds the mount.
    let unmarked =
        netns::within(&lab, || Command::new("sleep").arg("600").env_clear().spawn()).unwrap().unwrap();
    let marked = lab.command("sleep").arg("600").spawn().unwrap();
    let mut holder = Command::new("sleep");
    holder.arg("600").current_dir(&mount);
    start(&lab, "holder", Network::Host, &holder).unwrap();

    down(&lab);
    assert_nothing_left(&lab);
    for mut child in [unmarked, marked] {
        // Collected only now: until then it is a zombie, which holds nothing.
        assert!(!child.wait().unwrap().success());
    }
}

#[test]
fn a_killed_build_is_ended_and_its_files_are_swept() {
    let lab = lab_beside("build");
    let cache = tempfile::tempdir().unwrap();
    let mut up = start_up(&lab, Some(cache.path()));
    sleep(Duration::from_millis(1500));
    up.kill().unwrap();
    up.wait().unwrap();
    let unfinished = || {
        fs::read_dir(cache.path().join("kube"))
            .into_iter()
            .flatten()
            .flatten()
            .any(|entry| entry.path().is_dir())
    };
    assert!(unfinished(), "the build had not begun: the test proves nothing");
    let output = lab_binary()
        .unwrap()
        .args(["--name", lab.name(), "down"])
        .env("HOWDAH_CACHE", cache.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!unfinished());
    assert_nothing_left(&lab);
}
