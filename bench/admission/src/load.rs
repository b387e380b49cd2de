//! Sends reviews and takes the times.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use howdah_lab::lab::Lab;
use howdah_lab::netns;
use howdah_lab::reviews::Connection;
use rustls::ClientConfig;

/// Connections, each with a thread of its own. An API server keeps up to 25.
pub const CONNECTIONS: usize = 16;

/// Where reviews go.
#[derive(Clone)]
pub struct Target {
    /// The lab in whose network namespace the server listens.
    pub lab: Lab,
    /// Its address.
    pub address: SocketAddr,
    /// What the client trusts.
    pub trust: Arc<ClientConfig>,
}

/// Sends `count` reviews at `rate` a second whatever the answers do, and gives the time from when each was due to its
/// answer, sorted: a server that stalls makes all that were due meanwhile late.
pub fn open_loop(target: &Target, requests: &[Vec<u8>; 2], rate: u32, count: usize) -> Result<Vec<Duration>> {
    let interval = Duration::from_secs(1) / rate;
    let next = AtomicUsize::new(0);
    let mut times = on_all_connections(target, |connection, start| {
        let mut times = Vec::with_capacity(count / CONNECTIONS * 2);
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return Ok(times);
            }
            let due = interval * u32::try_from(i).context("count reviews")?;
            std::thread::sleep(due.saturating_sub(start.elapsed()));
            review(connection, &requests[i % 2])?;
            times.push(start.elapsed().saturating_sub(due));
        }
    })?
    .concat();
    times.sort_unstable();
    Ok(times)
}

/// Sends reviews as fast as they are answered until `count` are, calling `look` every `look_every`; gives the time it took.
pub fn closed_loop(
    target: &Target,
    requests: &[Vec<u8>; 2],
    count: usize,
    look_every: Duration,
    mut look: impl FnMut(usize) + Send,
) -> Result<Duration> {
    let next = AtomicUsize::new(0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looker = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                look(next.load(Ordering::Relaxed).min(count));
                std::thread::sleep(look_every);
            }
        });
        let ended = on_all_connections(target, |connection, start| {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= count {
                    return Ok(start.elapsed());
                }
                review(connection, &requests[i % 2])?;
            }
        });
        done.store(true, Ordering::Relaxed);
        looker.join().map_err(|_| anyhow!("look at the server: it panicked"))?;
        ended.map(|times| times.into_iter().max().unwrap_or_default())
    })
}

/// Runs `work` on every connection at the same time, after a first review over each.
fn on_all_connections<T: Send>(
    target: &Target,
    work: impl Fn(&mut Connection, Instant) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    // Threads are in the network namespace of the one that starts them.
    netns::within(&target.lab, || {
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut connection = Connection::open(target.address, Arc::clone(&target.trust))?;
            // The handshake happens with the first bytes; any answer will do.
            connection.send(&howdah_lab::reviews::request("/validate", b"{}"))?;
            connections.push(connection);
        }
        let start = Instant::now();
        std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = connections
                .iter_mut()
                .map(|connection| scope.spawn(move || work(connection, start)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().map_err(|_| anyhow!("send reviews: a thread panicked"))?)
                .collect()
        })
    })?
}

fn review(connection: &mut Connection, request: &[u8]) -> Result<()> {
    let answer = connection.send(request)?;
    let allowed = answer.body.windows(14).any(|window| window == br#""allowed":true"#);
    ensure!(
        answer.status == 200 && allowed,
        "a review was answered {}: {}",
        answer.status,
        String::from_utf8_lossy(&answer.body)
    );
    Ok(())
}
