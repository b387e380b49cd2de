//! howdah as installed from deploy/: two replicas of each part, under their own service accounts, not as
//! root, and serving while one of the two is gone.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use howdah_lab::install::NAMESPACE;
use howdah_lab::lab::Lab;
use howdah_lab::repository;
use serde_json::Value;

use crate::lab;

/// A pod takes seconds to start; on a busy node, many times that.
const START_LIMIT: Duration = Duration::from_secs(180);
/// A lost lease is free after 15 s and the next leader asks every 2 s, on nodes that take many times as long when the
/// machine does much else.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(180);
/// For how long requests are sent while a replica goes: longer than its drain takes.
const REQUESTS_TIME: Duration = Duration::from_secs(40);
const REQUESTS_PAUSE: Duration = Duration::from_millis(200);

/// These tests count replicas and take some away: one at a time.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn both_parts_run_twice_as_their_own_account_and_not_as_root() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let lab = lab().unwrap();
    for component in ["webhook", "scheduler"] {
        let pods = ready_pods(&lab, component).unwrap();
        assert_eq!(pods.len(), 2, "ready pods of the {component}");
        for pod in pods {
            let (name, spec) = (pod["metadata"]["name"].as_str().unwrap(), &pod["spec"]);
            assert_eq!(spec["serviceAccountName"], format!("howdah-{component}"));
            // PID 1 of the container, as its node sees it: what runs, not what the manifest asked for.
            let id = lab.kubectl_ok(&["-n", NAMESPACE, "exec", name, "--", "id", "-u"]).unwrap();
            assert_eq!(id.trim(), "65532", "{name} runs as another user");
            let written = lab.kubectl_ok(&["-n", NAMESPACE, "exec", name, "--", "touch", "/usr/x"]);
            assert!(written.unwrap_err().to_string().contains("Read-only file system"));
        }
    }
}

#[test]
fn no_request_fails_while_a_webhook_replica_is_deleted() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let lab = lab().unwrap();
    let namespace = lab.namespace("replica-goes").unwrap();
    let manifest = repository::root().join("deploy/examples/postgres.yaml");
    let manifest = manifest.to_str().unwrap();
    let doomed = ready_pods(&lab, "webhook").unwrap()[0]["metadata"]["name"].as_str().unwrap().to_owned();
    lab.kubectl_ok(&["-n", NAMESPACE, "delete", "pod", &doomed, "--wait=false"]).unwrap();
    let begin = Instant::now();
    let mut requests = 0;
    while begin.elapsed() < REQUESTS_TIME {
        let args = ["-n", namespace.name(), "create", "--dry-run=server", "-o", "json", "-f", manifest];
        let answer = lab.kubectl_ok(&args).unwrap();
        assert!(
            answer.contains(r#""terminationGracePeriodSeconds": 300"#),
            "admitted without howdah: {answer}"
        );
        requests += 1;
        thread::sleep(REQUESTS_PAUSE);
    }
    assert!(requests > 10, "only {requests} requests were sent while the replica went");
    wait_for("two webhook replicas again", START_LIMIT, || Ok(ready_pods(&lab, "webhook")?.len() == 2))
        .unwrap();
}

#[test]
fn the_other_scheduler_leads_when_the_leader_is_deleted() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let lab = lab().unwrap();
    wait_for("two schedulers", START_LIMIT, || Ok(ready_pods(&lab, "scheduler")?.len() == 2)).unwrap();
    wait_for("a first leader", TAKE_OVER_LIMIT, || Ok(!leader(&lab)?.is_empty())).unwrap();
    let first = leader(&lab).unwrap();
    let others: Vec<String> = ready_pods(&lab, "scheduler")
        .unwrap()
        .iter()
        .map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned())
        .filter(|name| !first.contains(name.as_str()))
        .collect();
    assert!(!others.is_empty(), "no second scheduler waits beside {first}");
    lab.kubectl_ok(&["-n", NAMESPACE, "delete", "pod", &first, "--wait=false"]).unwrap();
    wait_for("another leader", TAKE_OVER_LIMIT, || {
        let now = leader(&lab)?;
        Ok(!now.is_empty() && now != first)
    })
    .unwrap();
    wait_for("two schedulers again", START_LIMIT, || Ok(ready_pods(&lab, "scheduler")?.len() == 2)).unwrap();
}

/// The name of the pod that holds the schedulers' lease; empty while nobody does.
fn leader(lab: &Lab) -> Result<String> {
    let path = "jsonpath={.spec.holderIdentity}";
    lab.kubectl_ok(&["-n", NAMESPACE, "get", "lease", "howdah-scheduler", "--ignore-not-found", "-o", path])
}

/// The ready pods of a component, without those that are on their way out.
fn ready_pods(lab: &Lab, component: &str) -> Result<Vec<Value>> {
    let selector = format!("app.kubernetes.io/component={component}");
    let text = lab.kubectl_ok(&["-n", NAMESPACE, "get", "pods", "-l", &selector, "-o", "json"])?;
    let list: Value = serde_json::from_str(&text).context("read the list of pods")?;
    let pods = list["items"].as_array().context("find the pods in their list")?;
    let is_ready = |pod: &&Value| {
        let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
        conditions.any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
            && pod["metadata"]["deletionTimestamp"].is_null()
    };
    Ok(pods.iter().filter(is_ready).cloned().collect())
}

fn wait_for(what: &str, limit: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !holds()? {
        ensure!(Instant::now() < deadline, "{what}: not after {} s", limit.as_secs());
        thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}
