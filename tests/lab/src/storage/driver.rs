//! The CSI driver (go/csi) and Kubernetes' own sidecars (go/sidecars): provisioner, attacher and resizer.

use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::{DRIVER, NAMESPACE, monitor};
use crate::cache::{self, GoModule};
use crate::lab::Lab;
use crate::netns;
use crate::process::{self, Daemon, Network};

/// The driver's binary in [`Binaries::driver`].
const DRIVER_BINARY: &str = "howdah-lab-csi";
/// The packages of go/sidecars; each gives a binary of its last path element.
const SIDECAR_PACKAGES: [&str; 3] = [
    "github.com/kubernetes-csi/external-attacher/v4/cmd/csi-attacher",
    "github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner",
    "github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer",
];

struct Sidecar {
    name: &'static str,
    /// For metrics. Open once the sidecar has read its flags and found the driver.
    port: u16,
    flags: &'static [&'static str],
}

/// With the flags that Rook gives them.
const SIDECARS: [Sidecar; 3] = [
    Sidecar { name: "csi-attacher", port: 9811, flags: &["--default-fstype=ext4"] },
    Sidecar { name: "csi-resizer", port: 9812, flags: &["--handle-volume-inuse-error=false"] },
    Sidecar {
        name: "csi-provisioner",
        port: 9813,
        flags: &[
            "--default-fstype=ext4",
            "--extra-create-metadata=true",
            "--feature-gates=Topology=false",
            "--prevent-volume-mode-conversion=true",
            "--retry-interval-start=500ms",
        ],
    },
];
/// The driver listens a few milliseconds after its start; this allows for a machine that is very busy.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long a sidecar waits for one call to the driver, as Rook sets it.
const CALL_LIMIT: &str = "--timeout=150s";

/// Where the driver and its sidecars are.
pub(super) struct Binaries {
    driver: PathBuf,
    sidecars: PathBuf,
}

/// The folder with the driver's binary, built if need be. Nodes carry it, too.
pub fn driver_binary() -> Result<PathBuf> {
    cache::go_binaries(&GoModule { name: "csi", tags: &[], linker_flags: &[], packages: &["."] })
}

/// Builds the driver and the sidecars, if need be.
pub(super) fn binaries() -> Result<Binaries> {
    let driver = driver_binary()?;
    let sidecars = cache::go_binaries(&GoModule {
        name: "sidecars",
        tags: &[],
        linker_flags: &[],
        packages: &SIDECAR_PACKAGES,
    })?;
    Ok(Binaries { driver, sidecars })
}

/// Starts the controller half and its sidecars, whichever does not run.
pub(super) fn up(lab: &Lab, binaries: &Binaries) -> Result<()> {
    let socket = lab.path("csi/controller.sock");
    let mut controller = process::ensure(lab, "csi-controller", Network::Lab, || {
        let mut command = Command::new(binaries.driver.join(DRIVER_BINARY));
        command.args(["--mode=controller", &format!("--driver-name={DRIVER}")]);
        command.arg(format!("--endpoint={}", socket.display()));
        command.arg(format!("--cluster={NAMESPACE}={}", monitor()));
        Ok(command)
    })?;
    controller.wait_ready(START_LIMIT, || UnixStream::connect(&socket).is_ok())?;
    let mut sidecars = Vec::new();
    for sidecar in &SIDECARS {
        sidecars.push((sidecar, start(lab, binaries, sidecar, &socket)?));
    }
    for (sidecar, mut process) in sidecars {
        process.wait_ready(START_LIMIT, || answers(lab, sidecar.address()))?;
    }
    Ok(())
}

impl Sidecar {
    fn address(&self) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::LOCALHOST, self.port)
    }
}

fn start(lab: &Lab, binaries: &Binaries, sidecar: &Sidecar, socket: &Path) -> Result<Daemon> {
    process::ensure(lab, sidecar.name, Network::Lab, || {
        let mut command = Command::new(binaries.sidecars.join(sidecar.name));
        command.arg(format!("--csi-address={}", socket.display()));
        command.arg(format!("--kubeconfig={}", lab.inside_kubeconfig().display()));
        command.arg(format!("--http-endpoint={}", sidecar.address()));
        command.args([CALL_LIMIT, "--leader-election=false"]).args(sidecar.flags);
        Ok(command)
    })
}

fn answers(lab: &Lab, address: SocketAddrV4) -> bool {
    netns::within(lab, || TcpStream::connect(address).is_ok()).unwrap_or(false)
}
