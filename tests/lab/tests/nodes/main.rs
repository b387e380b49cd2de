//! The switches that break a node do what a broken node, or a broken network, does; what later tests of failover
//! stand on. A binary of its own, because no other test may use the nodes meanwhile. Each takes a node for itself, so that
//! two can wait at a time: breaking a node is mostly waiting.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use howdah_lab::lab::Lab;
use howdah_lab::node::Node;
use howdah_lab::node::faults::{self, From};
use howdah_lab::node::vm::{self, State};
use howdah_lab::process::{wait_some, wait_until};
use howdah_lab::testing::{TempNamespace, shared_name};

mod shutdown;

/// howdah as installed wants a majority that outlives one.
const NODES: u8 = 3;
/// The nodes that are broken, each by one test at a time.
const BREAKABLE: [u8; 2] = [1, 2];
/// Whether a test has the node of that place in [`BREAKABLE`]. A test that failed has mended its node all the same.
static TAKEN: [Mutex<()>; BREAKABLE.len()] = [const { Mutex::new(()) }; BREAKABLE.len()];
/// Longer than all other tests together may take: a node that never comes free is a failure.
const TURN_LIMIT: Duration = Duration::from_secs(1500);
/// A node is declared dead after ten seconds, and declared alive at its next lease; the rest is for a machine
/// that does much else.
const NOTICE_LIMIT: Duration = Duration::from_secs(180);
/// A pod runs some five seconds after it was created, alone.
const POD_LIMIT: Duration = Duration::from_secs(240);

/// A node's turn, until this is dropped.
type Turn = MutexGuard<'static, ()>;

/// Takes a node that no other test has.
fn take() -> (u8, Turn) {
    let free = || {
        BREAKABLE.iter().zip(&TAKEN).find_map(|(node, turn)| match turn.try_lock() {
            Ok(turn) => Some((*node, turn)),
            Err(TryLockError::Poisoned(failed)) => Some((*node, failed.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        })
    };
    wait_some(TURN_LIMIT, free).unwrap()
}

/// The shared lab. It is brought up once, by whoever comes first: `up` would mend what another test has broken by then.
fn lab() -> Lab {
    Lab::open_or_up(&shared_name(), NODES).unwrap()
}

/// Takes all nodes: no test breaks one meanwhile.
fn take_all() -> Vec<Turn> {
    TAKEN.iter().map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner)).collect()
}

/// A node that is whole again at the end, whatever the test did to it.
struct Victim {
    lab: Lab,
    node: Node,
    _turns: Vec<Turn>,
}

impl Victim {
    fn take() -> Self {
        let (number, turn) = take();
        Self { lab: lab(), node: Node::numbered(number).unwrap(), _turns: vec![turn] }
    }

    fn is_ready(&self) -> bool {
        let path = "jsonpath={.status.conditions[?(@.type=='Ready')].status}";
        self.lab.kubectl_ok(&["get", "node", &self.node.name(), "-o", path]).is_ok_and(|said| said == "True")
    }

    fn wait_ready(&self, wanted: bool) {
        let seen = wait_until(NOTICE_LIMIT, || self.is_ready() == wanted);
        assert!(seen, "{} did not become {}", self.node.name(), if wanted { "Ready" } else { "NotReady" });
    }

    /// Cuts the node off; says when the cut has lasted as long as the watching pod needs to see it.
    fn cut(&self, from: From) -> Instant {
        faults::cut(&self.lab, self.node, from).unwrap();
        Instant::now() + CUT
    }

    /// A pod on the node that runs `script`, and that nothing but its own deletion takes away.
    fn run(&self, script: &str) -> Pod<'_> {
        self.start(script, false)
    }

    /// A pod on the node that can do there what its administrator can, by `exec`.
    fn administrator(&self) -> Pod<'_> {
        self.start("sleep infinity", true)
    }

    fn start(&self, script: &str, privileged: bool) -> Pod<'_> {
        let namespace = self.lab.namespace("nodes").unwrap();
        let pod = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": "probe", "namespace": namespace.name() },
            "spec": {
                "nodeName": self.node.name(),
                "terminationGracePeriodSeconds": 1,
                "hostPID": privileged,
                "tolerations": [{ "operator": "Exists" }],
                "containers": [{
                    "name": "probe",
                    "image": "docker.io/library/postgres:15",
                    "imagePullPolicy": "Never",
                    "securityContext": { "privileged": privileged },
                    "command": ["bash", "-c", script],
                }],
            },
        });
        let applied = self.lab.kubectl_apply(&pod.to_string()).unwrap();
        assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
        let pod = Pod { victim: self, namespace };
        let running = wait_until(POD_LIMIT, || pod.get("{.status.phase}") == "Running");
        assert!(running, "the pod did not start: {}", pod.get("{.status}"));
        pod
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        if let Err(error) = faults::start(&self.lab, self.node) {
            eprintln!("mend {}: {error:#}", self.node.name());
        }
    }
}

struct Pod<'a> {
    victim: &'a Victim,
    namespace: TempNamespace,
}

impl Pod<'_> {
    fn get(&self, path: &str) -> String {
        let path = format!("jsonpath={path}");
        let args = ["get", "pod", "probe", "-n", self.namespace.name(), "-o", &path];
        self.victim.lab.kubectl_ok(&args).unwrap_or_default()
    }

    fn logs(&self) -> anyhow::Result<String> {
        self.victim.lab.kubectl_ok(&["logs", "probe", "-n", self.namespace.name(), "--request-timeout=20s"])
    }

    fn exec(&self, script: &str) -> anyhow::Result<String> {
        let args = ["exec", "probe", "-n", self.namespace.name(), "--", "bash", "-c", script];
        self.victim.lab.kubectl_ok(&args)
    }

    /// Waits until the pod has written `line` after the `from`th byte of its log.
    fn wait_line(&self, from: usize, line: &str) {
        let seen = wait_until(NOTICE_LIMIT, || {
            self.logs().is_ok_and(|logs| logs.get(from..).is_some_and(|new| new.lines().any(|l| l == line)))
        });
        assert!(seen, "the pod did not write {line:?}; it wrote:\n{}", self.logs().unwrap_or_default());
    }
}

/// How long a cut from the API lasts: the pod's log cannot be read meanwhile, and in 17 s a round of [`WATCH`] has begun and
/// ended in it, at whatever point of one the cut fell. NotReady may be seen after eight.
const CUT: Duration = Duration::from_secs(30);
/// Says, two seconds after it knows, what answers.
const WATCH: &str = "reach() { timeout 5 bash -c \"</dev/tcp/10.77.0.1/$1\" 2>/dev/null && echo yes || echo no; }; \
                     while true; do echo \"api $(reach 6443) ceph $(reach 6789)\"; sleep 2; done";

#[test]
fn exec_and_logs_work() {
    let victim = Victim::take();
    let pod = victim.run("echo 'said at the start'; sleep infinity");
    assert_eq!(pod.exec("cat /etc/hostname; id -u").unwrap(), "probe\n0\n");
    assert_eq!(pod.logs().unwrap(), "said at the start\n");
    let failed = pod.exec("echo 'said on failure' >&2; exit 3").unwrap_err().to_string();
    assert!(failed.contains("said on failure"), "{failed}");
}

/// By `..` its administrator gets to the root of what the kernel of the node sees, and to no file of this machine there.
#[test]
fn a_node_sees_the_folder_of_logs_and_keeps_to_one_processor() {
    let victim = Victim::take();
    let pod = victim.administrator();
    let shown = |options: &str| {
        let mount = format!(
            "mkdir -p /seen && mount -t hostfs -o '{options}' none /seen && ls -a /seen; umount /seen"
        );
        pod.exec(&mount).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(shown("").contains(&"kube-apiserver.log".to_owned()));
    let above = shown("../../../../../../../../../..");
    assert!(above.contains(&"linux".to_owned()), "{above:?}");
    assert!(!above.iter().any(|name| ["etc", "home", "usr"].contains(&name.as_str())), "{above:?}");

    let kernel = howdah_lab::process::running(&victim.lab, &victim.node.name()).unwrap().identity().pid;
    let status = fs::read_to_string(format!("/proc/{kernel}/status")).unwrap();
    let processors = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    assert!(processors.parse::<usize>().is_ok(), "its kernel may run on the processors {processors}");
}

#[test]
fn a_killed_node_becomes_not_ready_and_boots_afresh() {
    let victim = Victim::take();
    let before = faults::boot_id(&victim.lab, victim.node).unwrap();
    faults::kill(&victim.lab, victim.node).unwrap();
    assert_eq!(vm::state(&victim.lab, victim.node), State::Dead);
    victim.wait_ready(false);
    let refused = faults::freeze(&victim.lab, victim.node).unwrap_err().to_string();
    assert!(refused.contains("does not run"), "{refused}");

    faults::start(&victim.lab, victim.node).unwrap();
    assert!(victim.is_ready());
    assert_ne!(faults::boot_id(&victim.lab, victim.node).unwrap(), before);
}

#[test]
fn a_frozen_node_comes_back_with_its_processes() {
    let victim = Victim::take();
    let pod = victim.run("sleep infinity");
    // The kernel's boot, and the moment since then at which the container's first process started.
    let who = "cat /proc/sys/kernel/random/boot_id; cut -d' ' -f22 /proc/1/stat";
    let before = (pod.exec(who).unwrap(), pod.get("{.metadata.uid}"));
    faults::freeze(&victim.lab, victim.node).unwrap();
    assert_eq!(vm::state(&victim.lab, victim.node), State::Frozen);
    victim.wait_ready(false);

    faults::thaw(&victim.lab, victim.node).unwrap();
    victim.wait_ready(true);
    assert_eq!((pod.exec(who).unwrap(), pod.get("{.metadata.uid}")), before);
}

#[test]
fn a_node_cut_from_ceph_keeps_the_api() {
    let victim = Victim::take();
    let pod = victim.run(WATCH);
    pod.wait_line(0, "api yes ceph yes");
    faults::cut(&victim.lab, victim.node, From::Ceph).unwrap();
    let from = pod.logs().unwrap().len();
    pod.wait_line(from, "api yes ceph no");
    assert!(victim.is_ready());
    assert!(howdah_lab::node::describe(&victim.lab).unwrap().contains("cut from ceph"));

    faults::heal(&victim.lab, victim.node, From::Ceph).unwrap();
    let from = pod.logs().unwrap().len();
    pod.wait_line(from, "api yes ceph yes");
}

#[test]
fn a_node_cut_from_the_api_keeps_ceph_and_is_not_ready() {
    let victim = Victim::take();
    let pod = victim.run(WATCH);
    pod.wait_line(0, "api yes ceph yes");
    let from = pod.logs().unwrap().len();
    let healed = victim.cut(From::Api);
    victim.wait_ready(false);
    assert!(pod.logs().is_err(), "the apiserver reaches the kubelet of a node that is cut off");

    thread::sleep(healed.saturating_duration_since(Instant::now()));
    faults::heal(&victim.lab, victim.node, From::Api).unwrap();
    victim.wait_ready(true);
    // What it could reach meanwhile is in its log, in order.
    pod.wait_line(from, "api no ceph yes");
    let from = pod.logs().unwrap().len();
    pod.wait_line(from, "api yes ceph yes");
}

#[test]
fn a_node_cut_from_both_reaches_nothing() {
    let victim = Victim::take();
    let pod = victim.run(WATCH);
    pod.wait_line(0, "api yes ceph yes");
    let from = pod.logs().unwrap().len();
    let healed = victim.cut(From::Both);
    victim.wait_ready(false);
    thread::sleep(healed.saturating_duration_since(Instant::now()));
    faults::heal(&victim.lab, victim.node, From::Both).unwrap();
    victim.wait_ready(true);
    pod.wait_line(from, "api no ceph no");
    let from = pod.logs().unwrap().len();
    pod.wait_line(from, "api yes ceph yes");
}
