//! What tests share: a lab that is up, clients for it, and things that clean up after themselves.
//!
//! Tests that need a lab fail when it cannot be brought up; they never skip.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};
use nix::sys::signal::Signal;

use crate::lab::Lab;
use crate::netns;
use crate::process::{self, Daemon, Network, TERM_LIMIT, output_within, wait_until};

/// A namespace is ready for pods within a second of its creation; under load it takes a few.
const NAMESPACE_LIMIT: Duration = Duration::from_secs(180);
/// A command of a test that takes longer hangs: a snapshot of a stalled writer takes 30 s, the longest of all.
const COMMAND_LIMIT: Duration = Duration::from_secs(180);

/// The lab that tests share: `HOWDAH_LAB`, or `main`.
pub fn shared_name() -> String {
    std::env::var("HOWDAH_LAB").unwrap_or_else(|_| "main".to_owned())
}

/// A process that a test started in the lab's namespace; it ends when this is dropped.
#[derive(Debug)]
pub struct Process {
    lab: Lab,
    daemon: Option<Daemon>,
    /// Length of its log when it was started; what stands before is of earlier processes of its name.
    log_start: usize,
}

/// A Kubernetes namespace of one test's own; its deletion begins when this is dropped.
#[derive(Debug)]
pub struct TempNamespace {
    lab: Lab,
    name: String,
}

impl Lab {
    /// The lab `name`, brought up to at least `nodes` nodes and Ceph if it is not.
    pub fn open_or_up(name: &str, nodes: u8) -> Result<Self> {
        bring_up(name, &["--nodes", &nodes.to_string()])
    }

    /// The lab `name` with at least a control plane, for tests that only talk to the apiserver.
    pub fn open_or_up_without_ceph(name: &str) -> Result<Self> {
        bring_up(name, &["--without-ceph"])
    }

    /// A kube client with the admin's rights. Must be called in a Tokio runtime.
    pub async fn client(&self) -> Result<kube::Client> {
        self.client_from(&self.kubeconfig()).await
    }

    /// A kube client from a kubeconfig file.
    pub async fn client_from(&self, kubeconfig: &Path) -> Result<kube::Client> {
        // Fails only when a provider is installed already, which is what we want.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let kubeconfig = Kubeconfig::read_from(kubeconfig).context("read the kubeconfig")?;
        let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .context("read the kubeconfig")?;
        // "Not now" (429) is an answer that tests look at.
        config.default_retry = false;
        kube::Client::try_from(config).context("make a kube client")
    }

    /// Runs kubectl with the admin's rights and gives its exit status and what it printed.
    pub fn kubectl(&self, args: &[&str]) -> Result<Output> {
        self.kubectl_with_input(args, "")
    }

    /// Runs kubectl and gives what it printed; fails when it fails.
    pub fn kubectl_ok(&self, args: &[&str]) -> Result<String> {
        output_within(self.kubectl_command().args(args), COMMAND_LIMIT)
    }

    /// `kubectl apply` of one or more objects in YAML.
    pub fn kubectl_apply(&self, yaml: &str) -> Result<Output> {
        self.kubectl_with_input(&["apply", "-f", "-"], yaml)
    }

    /// Runs kubectl with something on its standard input.
    pub fn kubectl_with_input(&self, args: &[&str], input: &str) -> Result<Output> {
        let mut child = self
            .kubectl_command()
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("run kubectl")?;
        let mut stdin = child.stdin.take().context("open kubectl's standard input")?;
        let input = input.to_owned();
        // On a thread, because kubectl may print before it has read everything.
        let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output().context("wait for kubectl")?;
        // A kubectl that fails before it reads leaves a broken pipe; its own message says more.
        let _ = writer.join();
        Ok(output)
    }

    /// Runs the `ceph` command as Ceph's administrator and gives what it printed.
    pub fn ceph(&self, args: &[&str]) -> Result<String> {
        self.output_inside(self.command("ceph").args(args))
    }

    /// Runs the `rbd` command as Ceph's administrator and gives what it printed.
    pub fn rbd(&self, args: &[&str]) -> Result<String> {
        self.output_inside(self.command("rbd").args(args))
    }

    /// Runs a command to its end in the lab's network namespace; fails when it fails or takes three minutes.
    pub fn output_inside(&self, command: &mut Command) -> Result<String> {
        netns::within(self, || output_within(command, COMMAND_LIMIT))?
    }

    /// Starts a process in the lab's network namespace; its output goes to the lab's logs/NAME.log. One of
    /// the same name that a killed test left is ended first.
    pub fn spawn_inside(&self, name: &str, command: &Command) -> Result<Process> {
        if let Some(left) = process::running(self, name) {
            left.stop(self, TERM_LIMIT)?;
        }
        let log_start = std::fs::metadata(process::log_path(self, name)).map_or(0, |log| log.len() as usize);
        let daemon = process::start(self, name, Network::Lab, command)?;
        Ok(Process { lab: self.clone(), daemon: Some(daemon), log_start })
    }

    /// A new Kubernetes namespace `PREFIX-RANDOM` in which pods can be created.
    pub fn namespace(&self, prefix: &str) -> Result<TempNamespace> {
        let manifest =
            format!(r#"{{"apiVersion":"v1","kind":"Namespace","metadata":{{"generateName":"{prefix}-"}}}}"#);
        let created =
            self.kubectl_with_input(&["create", "-f", "-", "-o", "jsonpath={.metadata.name}"], &manifest)?;
        if !created.status.success() {
            bail!("create a namespace: {}", String::from_utf8_lossy(&created.stderr).trim());
        }
        let name = String::from_utf8_lossy(&created.stdout).into_owned();
        let namespace = TempNamespace { lab: self.clone(), name };
        let wanted = ["get", "serviceaccount/default", "configmap/kube-root-ca.crt", "-n", namespace.name()];
        if !wait_until(NAMESPACE_LIMIT, || self.kubectl_ok(&wanted).is_ok()) {
            bail!("wait for the ServiceAccount of namespace {}: none appeared", namespace.name());
        }
        Ok(namespace)
    }
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> Option<i32> {
        self.daemon.as_ref().map(|daemon| daemon.identity().pid)
    }

    /// Length of its log when it was started; what stands before is of earlier processes of its name.
    pub fn log_start(&self) -> usize {
        self.log_start
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.daemon.as_mut().is_some_and(Daemon::is_alive)
    }

    /// Everything it has printed.
    pub fn output(&self) -> Result<String> {
        let daemon = self.daemon.as_ref().context("find the process: it was ended")?;
        let log = std::fs::read(daemon.log()).with_context(|| format!("read {}", daemon.log().display()))?;
        Ok(String::from_utf8_lossy(log.get(self.log_start..).unwrap_or_default()).into_owned())
    }

    /// Waits until `ready` says so; fails, with the end of its output, when it ends before or `limit` passes.
    pub fn wait_ready(&mut self, limit: Duration, ready: impl FnMut() -> bool) -> Result<()> {
        self.daemon.as_mut().context("find the process: it was ended")?.wait_ready(limit, ready)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.daemon.as_ref().map_or(Ok(()), |daemon| daemon.identity().signal(signal))
    }

    /// Waits for it to end by itself; says whether it did within `limit`.
    pub fn wait_gone(&mut self, limit: Duration) -> bool {
        wait_until(limit, || !self.is_alive())
    }

    /// Ends it: SIGTERM, then, after ten seconds, SIGKILL.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), |daemon| daemon.stop(&self.lab, TERM_LIMIT))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("{error:#}");
        }
    }
}

impl TempNamespace {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for TempNamespace {
    fn drop(&mut self) {
        let deleted = self.lab.kubectl_ok(&["delete", "namespace", &self.name, "--wait=false"]);
        if let Err(error) = deleted {
            eprintln!("delete namespace {}: {error:#}", self.name);
        }
    }
}

/// Runs `howdah-lab up`, once per process and wish: the many tests of one binary share the lab.
fn bring_up(name: &str, args: &[&str]) -> Result<Lab> {
    /// By lab, which come up beside each other: what was wished for and is done.
    type Done = Arc<Mutex<HashSet<String>>>;
    static LABS: Mutex<BTreeMap<String, Done>> = Mutex::new(BTreeMap::new());
    let lab = Lab::named(name)?;
    let done =
        LABS.lock().unwrap_or_else(PoisonError::into_inner).entry(name.to_owned()).or_default().clone();
    let wish = args.join(" ");
    let mut done = done.lock().map_err(|_| anyhow!("bring lab {name} up: another test failed to"))?;
    if !done.contains(&wish) {
        let status = process::lab_binary()?
            .args(["--name", name, "up"])
            .args(args)
            .stdin(Stdio::null())
            .status()
            .context("run howdah-lab")?;
        if !status.success() {
            bail!("bring lab {name} up: howdah-lab ended with {status}");
        }
        done.insert(wish);
    }
    Ok(lab)
}
