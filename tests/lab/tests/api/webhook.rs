//! A webhook of a test's own: the built binary beside a real API server, with configurations from deploy/ that reach
//! only the namespace of the test.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on panics, in its helpers too"
)]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use howdah_lab::lab::Lab;
use howdah_lab::netns;
use howdah_lab::repository;
use howdah_lab::reviews::{self, Tls};
use howdah_lab::testing::{Process, TempNamespace, shared_name};
use kube::Client;
use kube::client::Body;
use kube::core::Request;
use nix::sys::signal::Signal;
use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::records::install_definitions;

/// How long the webhook may take to become ready; it takes well below a second on an idle machine.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long a change may take to reach the caches of webhook and API server.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);
/// Both kinds of configuration. The first webhook of each is one that is meant to fail closed.
const CONFIGURATIONS: [&str; 2] = ["mutatingwebhookconfigurations", "validatingwebhookconfigurations"];
/// Pause between two looks.
const POLL: Duration = Duration::from_millis(100);
/// Limit of one raw request.
const REQUEST_LIMIT: Duration = Duration::from_secs(20);

/// The webhook of one test; it and its configurations end when this is dropped.
pub struct Webhook {
    /// The lab it runs in.
    pub lab: Lab,
    /// A client with the rights of an administrator.
    pub client: Client,
    /// The namespace that its configurations reach.
    pub namespace: TempNamespace,
    /// The name of its configurations.
    configuration: String,
    /// The namespace of its Secret.
    system: String,
    kubeconfig: PathBuf,
    replicas: Vec<Replica>,
    flags: Vec<String>,
    /// Whether the policies of deploy/ are applied for the namespace.
    floor: bool,
}

/// One process.
pub struct Replica {
    process: Option<Process>,
    name: String,
    /// Where it answers reviews.
    pub reviews: SocketAddr,
    /// Where it answers health and metrics.
    pub diagnostics: SocketAddr,
}

/// An answer of the API server.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The warnings, as sent.
    pub warnings: Vec<String>,
    /// The object, or the Status.
    pub body: Value,
}

impl Answer {
    /// Whether the request passed.
    pub fn passed(&self) -> bool {
        self.status < 300
    }

    /// The message of a refusal.
    pub fn message(&self) -> &str {
        self.body["message"].as_str().unwrap_or_default()
    }
}

impl Webhook {
    /// A namespace without a webhook, yet.
    pub async fn absent() -> Self {
        let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
        let client = lab.client().await.unwrap();
        install_definitions(&lab);
        let namespace = lab.namespace("webhook").unwrap();
        let (configuration, system) = (namespace.name().to_owned(), namespace.name().to_owned());
        let kubeconfig = lab.inside_kubeconfig();
        Self {
            lab,
            client,
            namespace,
            configuration,
            system,
            kubeconfig,
            replicas: Vec::new(),
            flags: Vec::new(),
            floor: false,
        }
    }

    /// Has the webhook run as it is installed: with these rights, in howdah's namespace, under its own names.
    pub fn run_as_installed(&mut self, kubeconfig: PathBuf) {
        self.configuration = "howdah".to_owned();
        self.system = "howdah-system".to_owned();
        self.kubeconfig = kubeconfig;
    }

    /// A webhook with these flags, ready.
    pub async fn start(flags: &[&str]) -> Self {
        let mut webhook = Self::absent().await;
        webhook.install(flags, 1);
        webhook
    }

    /// Applies the Secret and the configurations and starts the replicas; the configurations call the first.
    pub fn install(&mut self, flags: &[&str], replicas: usize) {
        self.start_replicas(flags, replicas);
        self.apply_configurations();
        self.wait_ready();
    }

    /// Applies the Secret and starts the replicas, which nothing calls yet.
    pub fn start_replicas(&mut self, flags: &[&str], replicas: usize) {
        self.flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        self.kubectl_apply(&manifest("webhook-ca.yaml", |object| {
            object["metadata"]["namespace"] = json!(self.system);
        }));
        for _ in 0..replicas {
            let replica = self.spawn(self.replicas.len());
            self.replicas.push(replica);
        }
    }

    /// Applies the configurations of deploy/, with the address of the first replica, and for this namespace alone beside
    /// kube-system, which they have to leave out by themselves.
    pub fn apply_configurations(&self) {
        self.kubectl_apply(&self.configurations(self.replicas[0].reviews));
    }

    /// The configurations of deploy/ as [`Self::apply_configurations`] applies them, with the address of a replica.
    pub fn configurations(&self, reviews: SocketAddr) -> String {
        manifest("webhook-configuration.yaml", |configuration| {
            configuration["metadata"]["name"] = json!(self.configuration);
            for webhook in configuration["webhooks"].as_array_mut().unwrap() {
                let path = webhook["clientConfig"]["service"]["path"].as_str().unwrap();
                webhook["clientConfig"] = json!({"url": format!("https://{reviews}{path}")});
                let selector = &mut webhook["namespaceSelector"];
                match selector["matchExpressions"].as_array_mut() {
                    Some(expressions) => expressions.push(json!({
                        "key": "kubernetes.io/metadata.name", "operator": "In",
                        "values": [self.namespace.name(), "kube-system"],
                    })),
                    // The probe is asked in the namespace of the webhook alone.
                    None => selector["matchLabels"]["kubernetes.io/metadata.name"] = json!(self.system),
                }
            }
        })
    }

    /// Applies the policies of deploy/ under names of this test's, for its namespace alone, and waits until they judge. A
    /// webhook would answer before them, so it must not be there yet.
    pub async fn apply_floor(&mut self) {
        self.floor = true;
        let own = |name: &Value| json!(format!("{}-{}", name.as_str().unwrap(), self.namespace.name()));
        self.kubectl_apply(&manifest("floor.yaml", |object| {
            object["metadata"]["name"] = own(&object["metadata"]["name"]);
            if object["kind"] == "ValidatingAdmissionPolicyBinding" {
                object["spec"]["policyName"] = own(&object["spec"]["policyName"]);
                object["spec"]["matchResources"] = json!({"namespaceSelector": {"matchLabels": {
                    "kubernetes.io/metadata.name": self.namespace.name(),
                }}});
            }
        }));
        let careless = json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet",
            "metadata": {"name": "is-the-floor-there", "labels": {"howdah.dev/protect": "true"}},
            "spec": {"replicas": 2, "serviceName": "x", "selector": {"matchLabels": {"app": "x"}}, "template": {
                "metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "x", "image": "x"}]},
            }},
        });
        self.eventually("the policies judge", || async {
            self.create("statefulsets", &careless, true).await.message().contains("ValidatingAdmissionPolicy")
        })
        .await;
    }

    /// Deletes the policies of [`Self::apply_floor`].
    fn delete_floor(&self) {
        let floor = manifest("floor.yaml", |object| {
            let name = object["metadata"]["name"].as_str().unwrap();
            object["metadata"]["name"] = json!(format!("{name}-{}", self.namespace.name()));
        });
        let arguments = ["delete", "--ignore-not-found", "-f", "-"];
        if let Err(error) = self.lab.kubectl_with_input(&arguments, &floor) {
            eprintln!("{error:#}");
        }
    }

    /// The failurePolicy of every webhook of both configurations, by the name of the webhook.
    pub async fn failure_policies(&self) -> BTreeMap<String, String> {
        let mut policies = BTreeMap::new();
        for kind in CONFIGURATIONS {
            for webhook in self.get(kind, &self.configuration).await["webhooks"].as_array().unwrap() {
                let text = |field: &str| webhook[field].as_str().unwrap().to_owned();
                policies.insert(text("name"), text("failurePolicy"));
            }
        }
        policies
    }

    fn kubectl_apply(&self, yaml: &str) {
        let output = self.lab.kubectl_apply(yaml).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Starts a replica, at the addresses of the one before where there was one: whoever knows them goes on knowing them.
    fn spawn(&self, index: usize) -> Replica {
        let (reviews, diagnostics) = match self.replicas.get(index) {
            Some(before) => (before.reviews, before.diagnostics),
            None => (free_port(&self.lab), free_port(&self.lab)),
        };
        let name = format!("{}-{index}", self.namespace.name());
        let mut command = Command::new(binary());
        command
            .args(["--listen", &reviews.to_string(), "--diagnostics", &diagnostics.to_string()])
            .args(["--namespace", &self.system, "--configuration", &self.configuration])
            .args(["--identity", &name])
            .args(["--name", &netns::BRIDGE_ADDRESS.to_string()])
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(&self.flags)
            .envs(reviews::environment().unwrap());
        // The audits of tests side by side would write each other's reports; the test of the audit turns its own on.
        let defaults = [
            ("--log", "info,howdah_webhook=debug"),
            ("--audit-interval-seconds", "0"),
            ("--propagation-seconds", "1"),
        ];
        for (flag, value) in defaults {
            if !self.flags.iter().any(|own| own == flag) {
                command.args([flag, value]);
            }
        }
        let process = self.lab.spawn_inside(&name, &command).unwrap();
        Replica { process: Some(process), name, reviews, diagnostics }
    }

    /// Waits until every replica is ready, and the webhooks that are meant to fail closed do: they have been reached.
    pub fn wait_ready(&mut self) {
        for index in 0..self.replicas.len() {
            let diagnostics = self.replicas[index].diagnostics;
            let lab = self.lab.clone();
            let process = self.replicas[index].process.as_mut().unwrap();
            process
                .wait_ready(READY_LIMIT, || {
                    let ready = netns::within(&lab, || plain_get(diagnostics, "/readyz")).unwrap();
                    ready.is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
                })
                .unwrap();
        }
        let deadline = Instant::now() + READY_LIMIT;
        for kind in CONFIGURATIONS {
            let policy = "jsonpath={.webhooks[0].failurePolicy}";
            let look = ["get", kind, &self.configuration, "-o", policy];
            while self.lab.kubectl_ok(&look).unwrap() != "Fail" {
                assert!(Instant::now() < deadline, "{kind} still fails open\n{}", self.output(0));
                std::thread::sleep(POLL);
            }
        }
    }

    /// Has the API server ask the webhook no more.
    pub fn remove_configurations(&self) {
        for kind in ["mutatingwebhookconfiguration", "validatingwebhookconfiguration"] {
            self.lab.kubectl_ok(&["delete", kind, &self.configuration, "--ignore-not-found"]).unwrap();
        }
    }

    /// A replica.
    pub fn replica(&self, index: usize) -> &Replica {
        &self.replicas[index]
    }

    /// Kills every replica as a crash would.
    pub fn kill(&mut self) {
        for index in 0..self.replicas.len() {
            self.kill_replica(index);
        }
    }

    /// Kills one replica as a crash would; it may have ended.
    pub fn kill_replica(&mut self, index: usize) {
        let Some(mut process) = self.replicas[index].process.take() else { return };
        process.signal(Signal::SIGKILL).unwrap();
        assert!(process.wait_gone(READY_LIMIT));
    }

    /// Asks the first replica to end, and returns at once.
    pub fn terminate(&self) {
        self.replicas[0].process.as_ref().unwrap().signal(Signal::SIGTERM).unwrap();
    }

    /// Waits for the first replica to have ended.
    pub fn wait_gone(&mut self) {
        assert!(self.replicas[0].process.as_mut().unwrap().wait_gone(READY_LIMIT));
        self.replicas[0].process = None;
    }

    /// Starts the first replica again, at the same addresses.
    pub fn restart(&mut self) {
        self.replicas[0] = self.spawn(0);
        self.wait_ready();
    }

    /// Has a replica end as a rollout does it, and starts it again at the same addresses; returns once it is ready.
    pub fn roll(&mut self, index: usize) {
        let process = self.replicas[index].process.as_mut().unwrap();
        process.signal(Signal::SIGTERM).unwrap();
        assert!(process.wait_gone(READY_LIMIT), "replica {index} does not end");
        self.replicas[index] = self.spawn(index);
        self.wait_ready();
    }

    /// The folder of a replica in /proc.
    pub fn proc(&self, index: usize) -> PathBuf {
        let pid = self.replicas[index].process.as_ref().and_then(Process::pid).unwrap();
        PathBuf::from("/proc").join(pid.to_string())
    }

    /// A figure of a replica's /proc/PID/status, in KiB.
    pub fn status_kib(&self, index: usize, key: &str) -> u64 {
        let status = std::fs::read_to_string(self.proc(index).join("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap()
    }

    /// What a replica has printed.
    pub fn output(&self, index: usize) -> String {
        let name = &self.replicas[index].name;
        std::fs::read_to_string(self.lab.path(format!("logs/{name}.log"))).unwrap()
    }

    /// The metrics of a replica.
    pub fn metrics(&self, index: usize) -> String {
        let address = self.replicas[index].diagnostics;
        netns::within(&self.lab, || plain_get(address, "/metrics")).unwrap().unwrap()
    }

    /// One request to the API server, in the namespace of the test.
    pub async fn send(&self, path: &str, request: impl FnOnce(Request) -> Raw) -> Answer {
        send(&self.client, &self.path(path), request).await
    }

    /// The same as somebody else, who has every right that RBAC can give.
    pub async fn send_as(&self, who: &Who, path: &str, request: impl FnOnce(Request) -> Raw) -> Answer {
        let as_somebody = |path: Request| request(path).map(|request| who.sign(request));
        send(&self.client, path, as_somebody).await
    }

    /// The namespace that howdah takes for its own.
    pub fn system(&self) -> &str {
        &self.system
    }

    /// The API path of a resource in the namespace of the test.
    fn path(&self, resource: &str) -> String {
        match resource {
            "persistentvolumeclaims" | "secrets" => {
                format!("/api/v1/namespaces/{}/{resource}", self.namespace.name())
            }
            "protectedsets" => {
                format!("/apis/howdah.dev/v1alpha1/namespaces/{}/{resource}", self.namespace.name())
            }
            "persistentvolumes" => format!("/api/v1/{resource}"),
            "storageclasses" => format!("/apis/storage.k8s.io/v1/{resource}"),
            _ if resource.ends_with("webhookconfigurations")
                || resource.starts_with("validatingadmission") =>
            {
                format!("/apis/admissionregistration.k8s.io/v1/{resource}")
            }
            _ => format!("/apis/apps/v1/namespaces/{}/{resource}", self.namespace.name()),
        }
    }

    /// Reads an object.
    pub async fn get(&self, resource: &str, name: &str) -> Value {
        let answer = self.send(resource, |request| request.get(name, &Default::default())).await;
        assert!(answer.passed(), "get {resource} {name}: {}", answer.message());
        answer.body
    }

    /// Creates an object.
    pub async fn create(&self, resource: &str, object: &Value, dry_run: bool) -> Answer {
        let data = serde_json::to_vec(object).unwrap();
        let params = kube::api::PostParams { dry_run, ..Default::default() };
        self.send(resource, |request| request.create(&params, data)).await
    }

    /// Deletes an object; it may be absent.
    pub async fn delete(&self, resource: &str, name: &str) {
        self.send(resource, |request| request.delete(name, &Default::default())).await;
    }

    /// The bundle that the API server has for every webhook of both configurations.
    pub async fn bundles(&self) -> Vec<String> {
        let mut bundles = Vec::new();
        for kind in CONFIGURATIONS {
            let configuration = self.get(kind, &self.configuration).await;
            for webhook in configuration["webhooks"].as_array().unwrap() {
                let text = webhook["clientConfig"]["caBundle"].as_str().unwrap_or_default();
                let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
                bundles.push(String::from_utf8(bytes).unwrap());
            }
        }
        bundles
    }

    /// Tries until `done` says so.
    pub async fn eventually<F: Future<Output = bool>>(&self, what: &str, mut done: impl FnMut() -> F) {
        let deadline = Instant::now() + SETTLE_LIMIT;
        while !done().await {
            let running = self.replicas.iter().filter_map(|replica| replica.process.as_ref());
            let logs = || running.map(|process| process.output().unwrap_or_default());
            assert!(
                Instant::now() < deadline,
                "{what}: not within {} s\n{}",
                SETTLE_LIMIT.as_secs(),
                logs().collect::<String>()
            );
            tokio::time::sleep(POLL).await;
        }
    }
}

impl Drop for Webhook {
    fn drop(&mut self) {
        for kind in CONFIGURATIONS {
            let arguments = ["delete", kind, &self.configuration, "--ignore-not-found"];
            if let Err(error) = self.lab.kubectl_ok(&arguments) {
                eprintln!("{error:#}");
            }
        }
        if self.floor {
            self.delete_floor();
        }
    }
}

/// Whom a request is made as.
#[derive(Debug, Clone)]
pub struct Who(Vec<String>);

impl Who {
    /// A user and its groups, in this order.
    pub fn new(words: impl IntoIterator<Item = String>) -> Self {
        Self(words.into_iter().collect())
    }

    /// Adds the headers of an impersonation. The last group is past RBAC, so that admission decides.
    fn sign(&self, mut request: http::Request<Vec<u8>>) -> http::Request<Vec<u8>> {
        let headers = request.headers_mut();
        let (user, groups) = self.0.split_first().expect("somebody has a name");
        headers.insert("impersonate-user", user.parse().unwrap());
        for group in groups.iter().map(String::as_str).chain(["system:masters"]) {
            headers.append("impersonate-group", group.parse().unwrap());
        }
        request
    }
}

/// What makes a request.
pub type Raw = Result<http::Request<Vec<u8>>, kube::core::request::Error>;

/// One request to the API server.
pub async fn send(client: &Client, path: &str, request: impl FnOnce(Request) -> Raw) -> Answer {
    let request = request(Request::new(path)).unwrap().map(Body::from);
    let response =
        tokio::time::timeout(REQUEST_LIMIT, client.send(request)).await.expect("an answer in time").unwrap();
    let status = response.status().as_u16();
    let warnings =
        response.headers().get_all("warning").iter().map(|text| text.to_str().unwrap().to_owned()).collect();
    let body = response.into_body().collect_bytes().await.unwrap();
    let body = serde_json::from_slice(&body).unwrap_or_else(|_| json!(String::from_utf8_lossy(&body)));
    Answer { status, warnings, body }
}

/// The documents of a YAML text.
pub fn documents(text: &str) -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(text)
        .map(|document| Value::deserialize(document).unwrap())
        .collect()
}

/// A file of deploy/base, changed.
fn manifest(file: &str, change: impl Fn(&mut Value)) -> String {
    let text = std::fs::read_to_string(repository::root().join("deploy/base").join(file)).unwrap();
    let mut yaml = String::new();
    for mut document in documents(&text) {
        change(&mut document);
        yaml.push_str("---\n");
        yaml.push_str(&serde_yaml_ng::to_string(&document).unwrap());
    }
    yaml
}

/// The binary that cargo built beside the tests.
fn binary() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let binary = own.parent().unwrap().parent().unwrap().join("howdah-webhook");
    assert!(binary.is_file(), "{} is missing; build it: cargo build --workspace --bins", binary.display());
    binary
}

/// An address in the lab's network where nobody listens.
pub fn free_port(lab: &Lab) -> SocketAddr {
    netns::within(lab, port_that_is_free).unwrap()
}

/// A port outside of those that outgoing connections get: one of them could take it while its replica is away.
fn port_that_is_free() -> SocketAddr {
    const PORTS: std::ops::Range<u16> = 20_000..32_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Other processes begin elsewhere.
    let begin = u16::try_from(std::process::id() % 97).unwrap() * 100;
    let length = PORTS.end - PORTS.start;
    (0..length)
        .map(|_| begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % length + PORTS.start)
        .map(|port| SocketAddr::from((netns::BRIDGE_ADDRESS, port)))
        .find(|address| TcpListener::bind(address).is_ok())
        .expect("a port is free")
}

/// A plain HTTP GET; `None` when nobody answers.
pub fn plain_get(address: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&address, REQUEST_LIMIT).ok()?;
    stream.set_read_timeout(Some(REQUEST_LIMIT)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// A new TCP connection from inside the lab.
pub fn tcp_connect(lab: &Lab, address: SocketAddr) -> std::io::Result<TcpStream> {
    // A socket stays in the namespace in which it was made.
    let stream = netns::within(lab, || TcpStream::connect_timeout(&address, REQUEST_LIMIT))
        .map_err(std::io::Error::other)??;
    stream.set_read_timeout(Some(REQUEST_LIMIT))?;
    Ok(stream)
}

/// A new TLS connection that trusts `bundle` alone, with a client certificate and its key (PEM) where they are given. The
/// handshake happens with the first byte.
pub fn tls_connect(
    lab: &Lab,
    address: SocketAddr,
    bundle: &str,
    identity: Option<(&str, &str)>,
) -> std::io::Result<Tls> {
    let trust = reviews::trust(bundle, identity).map_err(std::io::Error::other)?;
    let connected = netns::within(lab, || reviews::connect(address, trust)).map_err(std::io::Error::other)?;
    connected.map_err(std::io::Error::other)
}

/// The head of a POST with a body of this length, after which the connection is closed.
pub fn post_head(path: &str, length: usize) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: webhook\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\nconnection: close\r\n\r\n"
    )
}

/// A POST over a new TLS connection that trusts `bundle` alone; the status line, headers and body of the answer.
pub fn tls_post(
    lab: &Lab,
    address: SocketAddr,
    bundle: &str,
    path: &str,
    body: &[u8],
) -> std::io::Result<String> {
    post(&mut tls_connect(lab, address, bundle, None)?, path, body)
}

/// The same over a connection that is there.
pub fn post(tls: &mut Tls, path: &str, body: &[u8]) -> std::io::Result<String> {
    tls.write_all(post_head(path, body.len()).as_bytes())?;
    // A server that has seen enough may answer and close before it has read everything.
    let _ = tls.write_all(body);
    read_answer(tls)
}

/// Whatever comes until the connection ends.
pub fn read_answer(stream: &mut impl std::io::Read) -> std::io::Result<String> {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if answer.is_empty() => Err(error),
        _ => Ok(String::from_utf8_lossy(&answer).into_owned()),
    }
}
