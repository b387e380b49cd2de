//! The Kubernetes control plane: etcd, apiserver, controller-manager and scheduler, each a process of its own
//! out of one binary built from Go modules (go/kube).

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cache::{self, GoModule};
use crate::lab::Lab;
use crate::netns::{self, BRIDGE_ADDRESS};
use crate::process::{self, Network, output_within};
use crate::{files, forward, pki};

/// The apiserver's name among the lab's processes.
pub const API_SERVER: &str = "kube-apiserver";
/// The name of the relay from outside to the apiserver.
pub const API_FORWARD: &str = "api-forward";
/// The apiserver's port on the bridge.
pub const API_PORT: u16 = 6443;
/// Where etcd listens, inside the namespace only.
const ETCD: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 2379);
/// Where the scheduler answers when it is up (its default secure port).
const SCHEDULER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 10259);
/// etcd is up within a second; ten times the slowest seen on two busy cores.
const ETCD_LIMIT: Duration = Duration::from_secs(120);
/// The apiserver takes 3 s alone, and took two minutes on two cores that had twenty other things to do.
const API_LIMIT: Duration = Duration::from_secs(300);
/// Controllers make the first ServiceAccount within seconds of their start.
const CONTROLLERS_LIMIT: Duration = Duration::from_secs(300);
/// One question to an apiserver that is coming up; without an answer it is asked again.
const PROBE_LIMIT: Duration = Duration::from_secs(30);
/// The release that go/kube requires; without it `/version` is nonsense that clients choke on.
const VERSION: &str = "v1.36.2";

/// How fast the control plane notices a dead node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Seconds instead of minutes, for tests.
    #[default]
    Fast,
    /// What a plain Kubernetes does.
    Default,
}

/// The folder with `howdah-kube` and `kubectl`, built if need be.
pub fn binaries() -> Result<PathBuf> {
    let flags: Vec<String> = ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"]
        .iter()
        .flat_map(|package| {
            let mut parts = VERSION.trim_start_matches('v').split('.');
            let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            [
                format!("-X {package}.gitVersion={VERSION}"),
                format!("-X {package}.gitMajor={major}"),
                format!("-X {package}.gitMinor={minor}"),
            ]
        })
        .collect();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    cache::go_binaries(&GoModule {
        name: "kube",
        tags: &[],
        linker_flags: &flags,
        packages: &[".", "./kubectl"],
    })
}

/// Brings up whatever of the control plane is not running, from the folder that [`binaries`] gave, and writes the admin's
/// kubeconfig.
pub fn up(lab: &Lab, profile: Profile, binaries: &Path) -> Result<()> {
    let binary = &binaries.join("howdah-kube");
    pki::create(lab)?;
    link_kubectl(lab, &binaries.join("kubectl"))?;
    for client in ["controller-manager", "scheduler", "proxy"] {
        let credentials = pki::client_credentials(lab, client)?;
        let config = pki::kubeconfig(lab, &inside_url(), &credentials)?;
        process::write_atomically(&pki::file(lab, &format!("{client}.kubeconfig")), config.as_bytes())?;
    }
    let mut etcd = process::ensure(lab, "etcd", Network::Lab, || etcd_command(lab, binary))?;
    etcd.wait_ready(ETCD_LIMIT, || answers(lab, ETCD))?;
    let mut apiserver =
        process::ensure(lab, API_SERVER, Network::Lab, || apiserver_command(lab, binary, profile))?;
    let address = forward::ensure(lab, API_FORWARD, SocketAddrV4::new(BRIDGE_ADDRESS, API_PORT))?;
    let admin = pki::client_credentials(lab, "admin")?;
    let kubeconfig = pki::kubeconfig(lab, &format!("https://{address}"), &admin)?;
    process::write_atomically(&lab.kubeconfig(), kubeconfig.as_bytes())?;
    let kubeconfig = pki::kubeconfig(lab, &inside_url(), &admin)?;
    process::write_atomically(&lab.inside_kubeconfig(), kubeconfig.as_bytes())?;
    apiserver.wait_ready(API_LIMIT, || answers(lab, SocketAddrV4::new(BRIDGE_ADDRESS, API_PORT)))?;
    apiserver.wait_ready(API_LIMIT, || kubectl_says(lab, &["get", "--raw", "/readyz"], "ok"))?;

    let mut controllers = process::ensure(lab, "kube-controller-manager", Network::Lab, || {
        Ok(controller_manager_command(lab, binary, profile))
    })?;
    let mut scheduler =
        process::ensure(lab, "kube-scheduler", Network::Lab, || Ok(scheduler_command(lab, binary)))?;
    scheduler.wait_ready(CONTROLLERS_LIMIT, || answers(lab, SCHEDULER))?;
    // Pods can be created once their namespace has its ServiceAccount and the CA's ConfigMap.
    controllers.wait_ready(CONTROLLERS_LIMIT, || {
        let wanted = ["get", "serviceaccount/default", "configmap/kube-root-ca.crt", "-o", "name"];
        kubectl_says(lab, &wanted, "kube-root-ca.crt")
    })
}

/// The apiserver's URL for clients in the lab's namespace.
pub fn inside_url() -> String {
    format!("https://{BRIDGE_ADDRESS}:{API_PORT}")
}

/// Puts `kubectl` on the lab's PATH.
fn link_kubectl(lab: &Lab, binary: &Path) -> Result<()> {
    fs::create_dir_all(lab.path("bin")).context("create the lab's folder for programs")?;
    let link = lab.path("bin/kubectl");
    if fs::read_link(&link).is_ok_and(|target| target == binary) {
        return Ok(());
    }
    let fresh = lab.path("bin/.kubectl");
    files::remove_file(&fresh)?;
    std::os::unix::fs::symlink(binary, &fresh).context("link kubectl")?;
    fs::rename(&fresh, &link).context("link kubectl")
}

fn answers(lab: &Lab, address: SocketAddrV4) -> bool {
    /// Inside one machine a listener accepts at once.
    const LIMIT: Duration = Duration::from_secs(1);
    netns::within(lab, || TcpStream::connect_timeout(&address.into(), LIMIT).is_ok()).unwrap_or(false)
}

fn kubectl_says(lab: &Lab, args: &[&str], wanted: &str) -> bool {
    let mut kubectl = lab.kubectl_command();
    output_within(kubectl.args(args), PROBE_LIMIT).is_ok_and(|said| said.contains(wanted))
}

fn etcd_command(lab: &Lab, binary: &Path) -> Result<Command> {
    let config = format!(
        "name: lab\n\
         data-dir: {}\n\
         listen-client-urls: http://{ETCD}\n\
         advertise-client-urls: http://{ETCD}\n\
         listen-peer-urls: http://127.0.0.1:2380\n\
         initial-advertise-peer-urls: http://127.0.0.1:2380\n\
         initial-cluster: lab=http://127.0.0.1:2380\n\
         log-level: warn\n\
         # A lab does not outlive its machine, and fsync is most of etcd's work.\n\
         unsafe-no-fsync: true\n",
        lab.path("etcd").display()
    );
    let file = lab.path("etcd.yaml");
    process::write_atomically(&file, config.as_bytes())?;
    let mut command = component(binary, "etcd");
    command.arg(file);
    Ok(command)
}

/// Has the apiserver show a client certificate to webhooks that demand one (docs/client-certificates.md).
fn admission_configuration(lab: &Lab) -> Result<PathBuf> {
    let file = |name: &str| pki::file(lab, &format!("{}.{name}", pki::WEBHOOK_CLIENT));
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "users": [{"name": "*", "user": {"client-certificate": file("crt"), "client-key": file("key")}}],
    });
    process::write_atomically(&file("kubeconfig"), kubeconfig.to_string().as_bytes())?;
    let plugin = |name: &str| {
        json!({"name": name, "configuration": {
            "apiVersion": "apiserver.config.k8s.io/v1",
            "kind": "WebhookAdmissionConfiguration",
            "kubeConfigFile": file("kubeconfig"),
        }})
    };
    let configuration = json!({
        "apiVersion": "apiserver.config.k8s.io/v1",
        "kind": "AdmissionConfiguration",
        "plugins": [plugin("MutatingAdmissionWebhook"), plugin("ValidatingAdmissionWebhook")],
    });
    let path = lab.path("admission.yaml");
    process::write_atomically(&path, configuration.to_string().as_bytes())?;
    Ok(path)
}

/// One of Kubernetes' programs. A collector of garbage that runs a quarter as often saves a tenth of the apiserver's processor
/// time, for half a gigabyte.
fn component(binary: &Path, name: &str) -> Command {
    let mut command = Command::new(binary);
    command.arg(name).env("GOGC", "400");
    command
}

fn apiserver_command(lab: &Lab, binary: &Path, profile: Profile) -> Result<Command> {
    let mut command = component(binary, API_SERVER);
    command.args([
        "--bind-address=0.0.0.0",
        "--allow-privileged=true",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        // Webhooks are dialled at their endpoint's address: no kube-proxy runs beside the apiserver.
        "--enable-aggregator-routing=true",
        "--endpoint-reconciler-type=lease",
        // No DNS: exec and logs must not resolve a node's name.
        "--kubelet-preferred-address-types=InternalIP",
        "--profiling=false",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
    ]);
    command.arg(format!("--advertise-address={BRIDGE_ADDRESS}"));
    command.arg(format!("--secure-port={API_PORT}"));
    command.arg(format!("--etcd-servers=http://{ETCD}"));
    for (flag, name) in [
        ("tls-cert-file", "apiserver.crt"),
        ("tls-private-key-file", "apiserver.key"),
        ("client-ca-file", "ca.crt"),
        ("kubelet-certificate-authority", "ca.crt"),
        ("kubelet-client-certificate", "apiserver-kubelet-client.crt"),
        ("kubelet-client-key", "apiserver-kubelet-client.key"),
        ("proxy-client-cert-file", "front-proxy-client.crt"),
        ("proxy-client-key-file", "front-proxy-client.key"),
        ("requestheader-client-ca-file", "ca.crt"),
        ("service-account-key-file", "service-account.pub"),
        ("service-account-signing-key-file", "service-account.key"),
    ] {
        command.arg(format!("--{flag}={}", pki::file(lab, name).display()));
    }
    if profile == Profile::Fast {
        command
            .args(["--default-not-ready-toleration-seconds=5", "--default-unreachable-toleration-seconds=5"]);
    }
    let admission = admission_configuration(lab)?;
    command.arg(format!("--admission-control-config-file={}", admission.display()));
    Ok(command)
}

fn controller_manager_command(lab: &Lab, binary: &Path, profile: Profile) -> Command {
    let mut command = component(binary, "kube-controller-manager");
    command.args([
        "--bind-address=127.0.0.1",
        // Pod ranges are fixed per node (netns.rs), so nothing is left to allocate.
        "--allocate-node-cidrs=false",
        "--controllers=*,-node-ipam-controller",
        "--leader-elect=false",
        "--profiling=false",
        "--use-service-account-credentials=true",
    ]);
    for (flag, name) in [
        ("kubeconfig", "controller-manager.kubeconfig"),
        ("authentication-kubeconfig", "controller-manager.kubeconfig"),
        ("authorization-kubeconfig", "controller-manager.kubeconfig"),
        ("cluster-signing-cert-file", "ca.crt"),
        ("cluster-signing-key-file", "ca.key"),
        ("root-ca-file", "ca.crt"),
        ("service-account-private-key-file", "service-account.key"),
    ] {
        command.arg(format!("--{flag}={}", pki::file(lab, name).display()));
    }
    if profile == Profile::Fast {
        command.args([
            "--attach-detach-reconcile-sync-period=5s",
            "--kube-api-burst=400",
            "--kube-api-qps=200",
            // Nodes that share two processors renew their leases late under load; 6 s gave false alarms.
            "--node-monitor-grace-period=10s",
            "--node-monitor-period=1s",
            "--node-startup-grace-period=15s",
            "--node-eviction-rate=10",
            "--secondary-node-eviction-rate=10",
            "--unhealthy-zone-threshold=0.9",
        ]);
    }
    command
}

fn scheduler_command(lab: &Lab, binary: &Path) -> Command {
    let mut command = component(binary, "kube-scheduler");
    command.args(["--bind-address=127.0.0.1", "--leader-elect=false", "--profiling=false"]);
    for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
        command.arg(format!("--{flag}={}", pki::file(lab, "scheduler.kubeconfig").display()));
    }
    command
}
