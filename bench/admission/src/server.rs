//! The two servers, each a process of its own in the lab's network namespace.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use howdah_lab::lab::Lab;
use howdah_lab::testing::{Process, TempNamespace};
use howdah_lab::{netns, reviews};
use serde_json::json;

use crate::load::Target;

/// How long a server may take to answer; it takes well below a second.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Pause between two questions whether it is ready: the precision of that figure.
const POLL: Duration = Duration::from_millis(2);
/// In what the kernel counts processor time for user space; the same on every machine (USER_HZ).
const TICKS_A_SECOND: f64 = 100.0;
/// Limit of one such question.
const PROBE_LIMIT: Duration = Duration::from_millis(500);

/// A running server.
pub struct Server {
    process: Process,
    /// Where it answers reviews, and how it is trusted.
    pub target: Target,
    /// From the start of the process until it was ready.
    pub start_to_ready: Duration,
}

impl Server {
    /// Resident memory in KiB: now, or at the peak.
    pub fn memory_kib(&self, peak: bool) -> Result<u64> {
        let key = if peak { "VmHWM:" } else { "VmRSS:" };
        let status = self.proc("status")?;
        let line =
            status.lines().find_map(|line| line.strip_prefix(key)).context("find the memory of a server")?;
        line.trim().trim_end_matches(" kB").parse().context("read the memory of a server")
    }

    /// Processor time that it has used.
    pub fn processor_time(&self) -> Result<Duration> {
        let stat = self.proc("stat")?;
        // After the name, which may hold anything: state is the first field, user and system time the 12th and 13th.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |i: usize| {
            fields.get(i).and_then(|field| field.parse::<u64>().ok()).context("read processor time")
        };
        let seconds = (ticks(11)? + ticks(12)?) as f64 / TICKS_A_SECOND;
        Ok(Duration::from_secs_f64(seconds))
    }

    fn proc(&self, file: &str) -> Result<String> {
        let pid = self.process.pid().context("find a server: it has ended")?;
        fs::read_to_string(format!("/proc/{pid}/{file}")).with_context(|| format!("read /proc/{pid}/{file}"))
    }

    /// Ends it.
    pub fn stop(self) -> Result<()> {
        self.process.stop()
    }
}

/// Whatever howdah needs in the cluster: its Secret, its configurations, a storage class. Gone when this is dropped.
pub struct Cluster {
    lab: Lab,
    namespace: TempNamespace,
}

impl Cluster {
    /// Makes it. The configurations select nothing: the reviews do not come from the API server here.
    pub fn prepare(lab: &Lab) -> Result<Self> {
        let cluster = Self { lab: lab.clone(), namespace: lab.namespace("bench")? };
        let name = cluster.namespace.name();
        let webhook = json!({
            "name": "bench.howdah.dev",
            "clientConfig": {"url": "https://127.0.0.1:1/"},
            "rules": [{"apiGroups": ["apps"], "apiVersions": ["v1"], "resources": ["statefulsets"], "operations": ["CREATE"]}],
            "objectSelector": {"matchLabels": {"howdah.dev/benchmark": "nothing-has-this"}},
            "failurePolicy": "Ignore", "sideEffects": "None", "admissionReviewVersions": ["v1"],
        });
        let configuration = |kind: &str| json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": name}, "webhooks": [webhook]});
        let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "howdah-webhook-ca", "namespace": name}},
            {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "bench-rbd"},
             "provisioner": "rook-ceph.rbd.csi.ceph.com", "reclaimPolicy": "Retain",
             "parameters": {"imageFeatures": "layering,exclusive-lock,object-map,fast-diff", "mapOptions": "krbd:noshare"}},
            configuration("MutatingWebhookConfiguration"), configuration("ValidatingWebhookConfiguration"),
        ]});
        let output = lab.kubectl_apply(&objects.to_string())?;
        ensure!(output.status.success(), "prepare the cluster: {}", String::from_utf8_lossy(&output.stderr));
        Ok(cluster)
    }

    /// Starts howdah's webhook and waits until it is ready.
    pub fn howdah(&self) -> Result<Server> {
        let (reviews, diagnostics) = netns::within(&self.lab, || anyhow::Ok((free()?, free()?)))??;
        let name = self.namespace.name();
        let mut command = Command::new(beside_us("howdah-webhook")?);
        command
            .args(["--listen", &reviews.to_string(), "--diagnostics", &diagnostics.to_string()])
            .args(["--namespace", name, "--configuration", name, "--name", &reviews.ip().to_string()])
            .arg("--kubeconfig")
            .arg(self.lab.inside_kubeconfig())
            .envs(reviews::environment()?);
        let start = Instant::now();
        let process = self.lab.spawn_inside("bench-howdah", &command)?;
        wait(&self.lab, || {
            let answer = plain_get(diagnostics, "/readyz");
            answer.is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
        })?;
        let start_to_ready = start.elapsed();
        let bundle = self.lab.kubectl_ok(&[
            "get",
            "secret",
            "--namespace",
            name,
            "howdah-webhook-ca",
            "-o",
            "go-template={{index .data \"ca.crt\" | base64decode}}",
        ])?;
        let target =
            Target { lab: self.lab.clone(), address: reviews, trust: reviews::trust(&bundle, None)? };
        Ok(Server { process, target, start_to_ready })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let name = self.namespace.name();
        for (kind, name) in [
            ("mutatingwebhookconfiguration", name),
            ("validatingwebhookconfiguration", name),
            ("storageclass", "bench-rbd"),
        ] {
            if let Err(error) = self.lab.kubectl_ok(&["delete", kind, name, "--ignore-not-found"]) {
                eprintln!("{error:#}");
            }
        }
    }
}

/// Starts the floor and waits until it answers.
pub fn floor(lab: &Lab) -> Result<Server> {
    let address = netns::within(lab, free)??;
    let folder = tempfile::tempdir().context("make a folder for the floor's certificate")?;
    let certificate = folder.path().join("tls.crt");
    let mut command = Command::new(beside_us("bench-admission-floor")?);
    command.args(["--listen", &address.to_string()]).arg("--certificate").arg(&certificate);
    let start = Instant::now();
    let process = lab.spawn_inside("bench-floor", &command)?;
    wait(lab, || TcpStream::connect_timeout(&address, PROBE_LIMIT).is_ok())?;
    let start_to_ready = start.elapsed();
    let bundle = fs::read_to_string(&certificate).context("read the floor's certificate")?;
    let target = Target { lab: lab.clone(), address, trust: reviews::trust(&bundle, None)? };
    Ok(Server { process, target, start_to_ready })
}

/// A binary that cargo built beside this one, with the same profile.
pub fn beside_us(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("find own binary")?;
    let path = own.parent().unwrap_or(Path::new(".")).join(name);
    ensure!(path.is_file(), "find {}: it is not built; use make bench-admission", path.display());
    Ok(path)
}

fn free() -> Result<SocketAddr> {
    let listener =
        TcpListener::bind(SocketAddr::from((netns::BRIDGE_ADDRESS, 0))).context("find a free port")?;
    listener.local_addr().context("find a free port")
}

fn wait(lab: &Lab, ready: impl Fn() -> bool + Send) -> Result<()> {
    let is_ready = netns::within(lab, move || {
        let start = Instant::now();
        while start.elapsed() < START_LIMIT {
            if ready() {
                return true;
            }
            std::thread::sleep(POLL);
        }
        false
    })?;
    ensure!(is_ready, "wait for a server: it is not ready after {} s", START_LIMIT.as_secs());
    Ok(())
}

fn plain_get(address: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&address, PROBE_LIMIT).ok()?;
    stream.set_read_timeout(Some(PROBE_LIMIT)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}
