//! The way from outside into the lab: a process that listens on the machine's loopback address and carries
//! each connection to the apiserver inside the lab's network namespace.
//!
//! A socket belongs for ever to the namespace of the thread that opened it, so one process can hold both
//! ends: a thread of its own sits in the lab's namespace and does nothing but connect.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};

use crate::files;
use crate::lab::Lab;
use crate::netns;
use crate::process::{self, Network, write_atomically};

/// Connections at once: each kube client holds a few, and a test suite runs some tens of clients.
const CONNECTIONS_MAX: usize = 512;
/// The other end is on this machine, so it answers in milliseconds or not at all.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Time for the relay to write its address.
const START_LIMIT: Duration = Duration::from_secs(60);

/// The machine's loopback address, and whatever port is free.
const ANY_PORT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);

type Dial = oneshot::Sender<std::io::Result<TcpStream>>;

/// Makes sure the relay `name` runs to `target` inside the lab; gives the address it listens on outside.
///
/// The address is kept in a file, and taken again after a restart, so that a kubeconfig stays right.
pub fn ensure(lab: &Lab, name: &str, target: SocketAddrV4) -> Result<SocketAddrV4> {
    let file = address_file(lab, name);
    let previous = read_address(&file);
    let runs = process::running(lab, name).is_some();
    if let (true, Some(address)) = (runs, previous) {
        return Ok(address);
    }
    let listen = previous.unwrap_or(ANY_PORT);
    // What it says may belong to somebody else by now; the relay writes where it really listens.
    files::remove_file(&file)?;
    let mut daemon = process::ensure(lab, name, Network::Host, || {
        let mut command = process::lab_binary()?;
        command
            .args(["--name", lab.name(), "__forward", &listen.to_string(), &target.to_string()])
            .arg(&file);
        Ok(command)
    })?;
    let mut address = None;
    daemon.wait_ready(START_LIMIT, || {
        address = read_address(&file).filter(|address| TcpStream::connect(address).is_ok());
        address.is_some()
    })?;
    address.context("read the relay's address")
}

/// Where the relay `name` listens outside, or did when it last ran.
pub fn address(lab: &Lab, name: &str) -> Option<SocketAddrV4> {
    read_address(&address_file(lab, name))
}

/// The hidden command `__forward`: listens on `listen`, or, if that is taken, on any free port; writes the address to `file`, relays
/// to `target` until it is killed.
pub fn run(lab: &Lab, listen: SocketAddrV4, target: SocketAddrV4, file: &Path) -> Result<()> {
    let dialer = start_dialer(lab.clone(), target)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start relay")?;
    runtime.block_on(async {
        let listener = match TcpListener::bind(listen).await {
            // The port it had was taken while it did not run.
            Err(error) if error.kind() == ErrorKind::AddrInUse => TcpListener::bind(ANY_PORT).await,
            bound => bound,
        }
        .with_context(|| format!("listen on {listen}"))?;
        let address = listener.local_addr().context("read the relay's own address")?;
        write_atomically(file, address.to_string().as_bytes())?;
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let place = places.clone().acquire_owned().await.context("wait for a place")?;
            let (client, _) = listener.accept().await.context("accept a connection")?;
            let dialer = dialer.clone();
            tokio::spawn(async move {
                // Either end may hang up at any time; the other end then sees it, and that is all there is
                // to tell.
                let _ = relay(client, &dialer).await;
                drop(place);
            });
        }
    })
}

async fn relay(mut client: tokio::net::TcpStream, dialer: &SyncSender<Dial>) -> Result<()> {
    let (reply, answer) = oneshot::channel();
    dialer.send(reply).context("ask for a connection")?;
    let server = answer.await.context("wait for a connection")?.context("connect")?;
    server.set_nonblocking(true).context("hand the connection over")?;
    let mut server = tokio::net::TcpStream::from_std(server).context("hand the connection over")?;
    client.set_nodelay(true).context("set up the connection")?;
    server.set_nodelay(true).context("set up the connection")?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await.context("relay")?;
    Ok(())
}

fn start_dialer(lab: Lab, target: SocketAddrV4) -> Result<SyncSender<Dial>> {
    // Never blocks the sender: there are as many places as connections.
    let (sender, requests) = sync_channel::<Dial>(CONNECTIONS_MAX);
    let (entered, result) = sync_channel(1);
    thread::Builder::new()
        .name("dialer".to_owned())
        .spawn(move || {
            let inside = netns::enter(&lab);
            let failed = inside.is_err();
            if entered.send(inside).is_err() || failed {
                return;
            }
            for reply in requests {
                // The asker may have given up; its connection then closes.
                let _ = reply.send(TcpStream::connect_timeout(&SocketAddr::V4(target), CONNECT_LIMIT));
            }
        })
        .context("start the dialer")?;
    result.recv().context("wait for the dialer")??;
    Ok(sender)
}

fn address_file(lab: &Lab, name: &str) -> PathBuf {
    lab.path(format!("{name}.address"))
}

fn read_address(file: &Path) -> Option<SocketAddrV4> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}
