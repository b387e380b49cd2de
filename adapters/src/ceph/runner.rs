//! Where a Ceph command runs: in our own container, or in Rook's toolbox. Both run it as the same identity with a
//! key that never stands on a command line, both bound its time and output.

use std::fmt::{self, Debug};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::process::Command;

use super::CephError;
use crate::kubernetes::{Kubernetes, KubernetesError, PodCommand, read_bounded};

/// How long the client tries to reach the monitors before it says so itself (Ceph's default is 300 s).
pub(super) const MOUNT_LIMIT: Duration = Duration::from_secs(20);

/// Kept of a command's standard output. The largest answer is an image's metadata: 190 catalogue entries of at most 16 KiB,
/// before JSON escapes them.
const STDOUT_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Kept of a command's standard error; librbd writes a few lines per failure.
const STDERR_BYTES_MAX: usize = 64 * 1024;

/// What the toolbox adds to a call: finding the pod, the exec connection, a shell.
const EXEC_OVERHEAD: Duration = Duration::from_secs(15);

/// The label of Rook's toolbox deployment (`deploy/examples/toolbox.yaml`).
const TOOLBOX_LABELS: &str = "app=rook-ceph-tools";

/// `timeout(1)` ends with this code when the limit passed.
const TIMEOUT_EXIT_CODE: i32 = 124;

/// Run in the toolbox by `sh -c`: takes the key from its input, then identity, limit in seconds, program, arguments.
/// The toolbox itself is set up for the admin, who must never be used for a snapshot.
const TOOLBOX_SCRIPT: &str = r#"set -eu
umask 077
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
IFS= read -r key
id=$1 limit=$2 program=$3
shift 3
printf '[client.%s]\n\tkey = %s\n' "$id" "$key" >"$folder/keyring"
unset CEPH_ARGS
timeout -k 5 "$limit" "$program" --id "$id" --keyring "$folder/keyring" "$@" </dev/null
"#;

/// A Ceph user and its key. `Debug` shows no key.
#[derive(Clone, PartialEq, Eq)]
pub struct CephAccess {
    id: String,
    key: String,
}

impl Debug for CephAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CephAccess").field("id", &self.id).finish_non_exhaustive()
    }
}

impl CephAccess {
    /// `id` without `client.`, e.g. `howdah-backup`; `key` as in a keyring. Surrounding white space is dropped.
    ///
    /// # Errors
    /// If either has a character that would change the meaning of a keyring file.
    pub fn new(id: &str, key: &str) -> Result<Self, CephError> {
        let (id, key) = (id.trim(), key.trim());
        let refuse = |detail: &str| CephError::Other {
            attempt: format!("use the Ceph user {id:?}"),
            detail: detail.to_owned(),
        };
        if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
            return Err(refuse("a user is letters, digits, '-', '_' and '.', without the prefix client."));
        }
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte)) {
            return Err(refuse("its key is not base64 text"));
        }
        Ok(Self { id: id.to_owned(), key: key.to_owned() })
    }
}

/// Turns Rook's ConfigMap `rook-ceph-mon-endpoints`, key `data` (`a=10.0.0.1:6789,b=…`), into Ceph's `mon_host`.
///
/// # Errors
/// If an entry is not `name=address`.
pub fn mon_host_from_rook(data: &str) -> Result<String, CephError> {
    let address = |entry: &str| match entry.trim().split_once('=') {
        Some((name, address)) if !name.is_empty() && !address.is_empty() => Ok(address.to_owned()),
        _ => Err(CephError::Other {
            attempt: "read the monitors' addresses from rook-ceph-mon-endpoints".to_owned(),
            detail: format!("the entry {entry:?} is not NAME=ADDRESS:PORT"),
        }),
    };
    let addresses: Vec<String> = data.split(',').map(address).collect::<Result<_, _>>()?;
    Ok(addresses.join(","))
}

/// The answer of a command that ran to its end.
pub(super) struct Answer {
    pub exit_code: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// Where commands run.
#[derive(Clone, Debug)]
pub enum Runner {
    /// In this container.
    Local(LocalRunner),
    /// In Rook's toolbox pod.
    Toolbox(Box<ToolboxRunner>),
}

impl Runner {
    /// The Ceph user, without `client.`.
    #[must_use]
    pub fn id(&self) -> &str {
        match self {
            Self::Local(local) => &local.access.id,
            Self::Toolbox(toolbox) => &toolbox.access.id,
        }
    }

    pub(super) async fn run(
        &self,
        program: &str,
        arguments: &[&str],
        limit: Duration,
        attempt: &str,
    ) -> Result<Answer, CephError> {
        let call = Call { program, arguments, limit, attempt };
        // On the heap: several calls at once, each with the state of both ways inside, have overflowed a worker's stack in
        // an unoptimised build.
        let answer = match self {
            Self::Local(local) => Box::pin(local.run(&call)).await?,
            Self::Toolbox(toolbox) => Box::pin(toolbox.run(&call)).await?,
        };
        if answer.stdout.len() >= STDOUT_BYTES_MAX {
            return Err(call.failed(format!("its answer is longer than {STDOUT_BYTES_MAX} bytes")));
        }
        Ok(answer)
    }
}

/// One run of a command.
struct Call<'a> {
    program: &'a str,
    arguments: &'a [&'a str],
    limit: Duration,
    /// What it is for, as a verb phrase.
    attempt: &'a str,
}

impl Call<'_> {
    fn failed(&self, detail: String) -> CephError {
        CephError::Other { attempt: self.attempt.to_owned(), detail }
    }

    fn timed_out(&self) -> CephError {
        CephError::TimedOut { attempt: self.attempt.to_owned(), seconds: self.limit.as_secs() }
    }
}

/// Runs `rbd` and `ceph` as child processes, with a configuration of their own: nothing of the machine's
/// `/etc/ceph` or environment is used.
#[derive(Clone, Debug)]
pub struct LocalRunner {
    access: CephAccess,
    /// Holds `ceph.conf` and the keyring, and is removed with the last clone.
    folder: Arc<TempDir>,
}

impl LocalRunner {
    /// Writes the private configuration. `mon_host` is Ceph's option of that name: addresses, separated by commas.
    ///
    /// # Errors
    /// If `mon_host` is empty or has a line break, or the files cannot be written.
    pub fn new(access: CephAccess, mon_host: &str) -> Result<Self, CephError> {
        let attempt = "write the Ceph configuration";
        let other = |detail: String| CephError::Other { attempt: attempt.to_owned(), detail };
        if mon_host.trim().is_empty() || mon_host.contains(['\n', '\r', '#', ';']) {
            return Err(other(format!("{mon_host:?} is not a list of monitor addresses")));
        }
        let folder = tempfile::Builder::new()
            .prefix("howdah-ceph-")
            .tempdir()
            .map_err(|cause| other(format!("make a private folder: {cause}")))?;
        let keyring = folder.path().join("keyring");
        let seconds = MOUNT_LIMIT.as_secs();
        // An empty admin_socket and log_file: short-lived clients leave no files behind. The limit has two names,
        // before and since Ceph 17.
        let configuration = format!(
            "[global]\nmon_host = {mon_host}\nkeyring = {}\nadmin_socket =\nlog_file =\nlog_to_stderr = false\n\
             client_mount_timeout = {seconds}\nrados_mount_timeout = {seconds}\n",
            keyring.display()
        );
        let text = format!("[client.{}]\n\tkey = {}\n", access.id, access.key);
        write_private(&keyring, &text).map_err(|cause| other(cause.to_string()))?;
        write_private(&folder.path().join("ceph.conf"), &configuration)
            .map_err(|cause| other(cause.to_string()))?;
        Ok(Self { access, folder: Arc::new(folder) })
    }

    async fn run(&self, call: &Call<'_>) -> Result<Answer, CephError> {
        let program = call.program;
        let mut command = Command::new(program);
        command.arg("--conf").arg(self.folder.path().join("ceph.conf")).args(["--id", &self.access.id]);
        command.args(call.arguments).env_clear().env("LC_ALL", "C.UTF-8").env("TZ", "UTC");
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|cause| {
            call.failed(format!(
                "start the command {program}: {cause}; is the package ceph-common in the image?"
            ))
        })?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(call.failed("the command has no output".to_owned()));
        };
        let work = async {
            let (stdout, stderr, status) = tokio::join!(
                read_bounded(stdout, STDOUT_BYTES_MAX),
                read_bounded(stderr, STDERR_BYTES_MAX),
                child.wait()
            );
            Ok::<_, std::io::Error>((stdout?, stderr?, status?))
        };
        let ended = tokio::time::timeout(call.limit, work).await;
        let Ok(ended) = ended else {
            // Wait for its end, too: it must not take effect after we said that it did not answer.
            let _ = child.kill().await;
            return Err(call.timed_out());
        };
        let (stdout, stderr, status) =
            ended.map_err(|cause| call.failed(format!("read its answer: {cause}")))?;
        let Some(exit_code) = status.code() else {
            return Err(call.failed(format!("the command {program} ended by a signal: {status}")));
        };
        Ok(Answer { exit_code, stdout, stderr })
    }
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

/// Runs `rbd` and `ceph` in the pod of Rook's deployment `rook-ceph-tools`, as our own identity.
#[derive(Clone, Debug)]
pub struct ToolboxRunner {
    access: CephAccess,
    kubernetes: Kubernetes,
    namespace: String,
}

impl ToolboxRunner {
    /// `namespace` is Rook's, e.g. `rook-ceph`.
    #[must_use]
    pub fn new(access: CephAccess, kubernetes: Kubernetes, namespace: &str) -> Self {
        Self { access, kubernetes, namespace: namespace.to_owned() }
    }

    async fn run(&self, call: &Call<'_>) -> Result<Answer, CephError> {
        let failed = |cause: KubernetesError| match cause {
            KubernetesError::TimedOut { seconds, .. } => {
                CephError::TimedOut { attempt: call.attempt.to_owned(), seconds }
            }
            cause => call.failed(cause.to_string()),
        };
        let pod = self.kubernetes.ready_pod(&self.namespace, TOOLBOX_LABELS).await.map_err(failed)?;
        let seconds = call.limit.as_secs().to_string();
        let fixed = ["sh", "-c", TOOLBOX_SCRIPT, "howdah", &self.access.id, &seconds, call.program];
        let argv = fixed.iter().chain(call.arguments).map(|&argument| argument.to_owned());
        let argv: Vec<String> = argv.collect();
        let key_line = format!("{}\n", self.access.key);
        let command = PodCommand {
            namespace: &self.namespace,
            pod: pod.metadata.name.as_deref().unwrap_or_default(),
            container: None,
            argv: &argv,
            stdin: key_line.as_bytes(),
            output_bytes_max: STDOUT_BYTES_MAX,
            limit: call.limit + EXEC_OVERHEAD,
        };
        let output = self.kubernetes.exec(&command).await.map_err(failed)?;
        if output.exit_code == TIMEOUT_EXIT_CODE {
            return Err(call.timed_out());
        }
        Ok(Answer { exit_code: output.exit_code, stdout: output.stdout, stderr: output.stderr })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn access() -> CephAccess {
        CephAccess::new("howdah-backup", "AQDsecretkey==\n").unwrap()
    }

    #[test]
    fn rooks_endpoints_become_mon_host() {
        assert_eq!(mon_host_from_rook("a=10.77.0.1:6789").unwrap(), "10.77.0.1:6789");
        assert_eq!(
            mon_host_from_rook("a=1.1.1.1:3300, b=[fd00::1]:3300").unwrap(),
            "1.1.1.1:3300,[fd00::1]:3300"
        );
        for bad in ["", "a", "a=", "a=1.1.1.1:6789,"] {
            assert!(mon_host_from_rook(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_key_lies_in_a_private_file_and_goes_with_the_runner() {
        let runner = LocalRunner::new(access(), "127.0.0.1:1").unwrap();
        let keyring = runner.folder.path().join("keyring");
        assert_eq!(std::fs::metadata(&keyring).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(std::fs::read_to_string(&keyring).unwrap().contains("key = AQDsecretkey==\n"));
        assert!(!format!("{runner:?}").contains("secretkey"));
        drop(runner);
        assert!(!keyring.exists());
    }

    #[test]
    fn configuration_cannot_be_injected() {
        assert!(CephAccess::new("a b", "AQD=").is_err());
        assert!(CephAccess::new("a", "AQD=\n[client.admin]").is_err());
        assert!(LocalRunner::new(access(), "1.1.1.1\nkeyring=/x").is_err());
    }

    #[tokio::test]
    async fn a_command_that_hangs_is_killed_at_its_limit() {
        let runner = Runner::Local(LocalRunner::new(access(), "127.0.0.1:1").unwrap());
        let folder = tempfile::tempdir().unwrap();
        let slow = folder.path().join("slow");
        std::fs::write(&slow, "#!/bin/sh\nexec sleep 60\n").unwrap();
        std::fs::set_permissions(&slow, std::fs::Permissions::from_mode(0o755)).unwrap();
        let began = std::time::Instant::now();
        let answer = runner.run(slow.to_str().unwrap(), &[], Duration::from_millis(200), "wait").await;
        assert!(matches!(answer, Err(CephError::TimedOut { .. })));
        assert!(began.elapsed() < Duration::from_secs(30));
    }
}
