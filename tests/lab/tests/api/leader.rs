//! Leader election with two contenders on the real API server.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::time::Duration;

use howdah_adapters::leader::{Election, LeaderSettings};
use howdah_lab::lab::Lab;
use howdah_lab::testing::shared_name;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// Long enough that a slow machine does not take a living leader's lease away in a test.
const DURATION: Duration = Duration::from_secs(6);
/// What follows an event within a retry pause, on a busy machine.
const SOON: Duration = Duration::from_secs(20);

fn settings(namespace: &str, identity: &str) -> LeaderSettings {
    LeaderSettings {
        duration: DURATION,
        renew_deadline: Duration::from_secs(4),
        retry: Duration::from_millis(300),
        ..LeaderSettings::new(namespace, "test-leader", identity)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_leads_at_a_time_and_a_loss_is_told_at_once() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let namespace = lab.namespace("leader").unwrap();
    let client = lab.client().await.unwrap();
    let leases = Api::<Lease>::namespaced(client.clone(), namespace.name());
    let shutdown = CancellationToken::new();
    let first = Election::new(client.clone(), settings(namespace.name(), "first")).unwrap();
    let second = Election::new(client, settings(namespace.name(), "second")).unwrap();

    // A living leader is not displaced, however long the other one tries.
    let leading = first.acquire(&shutdown).await.unwrap();
    let waiting = tokio::time::timeout(DURATION * 2, second.acquire(&shutdown)).await;
    assert!(waiting.is_err(), "two lead at the same time");
    assert!(!leading.lost().is_cancelled());

    // One that resigns is followed at once, not after the lease's duration.
    let began = tokio::time::Instant::now();
    leading.resign().await;
    let next = tokio::time::timeout(SOON, second.acquire(&shutdown)).await.unwrap().unwrap();
    assert_eq!(next.term(), 1);
    assert!(began.elapsed() < DURATION, "the lease was not given back: {:?}", began.elapsed());

    // A lease that is taken away is a loss, told by the next renewal.
    let theft = json!({"spec": {"holderIdentity": "thief"}});
    leases.patch("test-leader", &PatchParams::default(), &Patch::Merge(&theft)).await.unwrap();
    tokio::time::timeout(SOON, next.lost().cancelled()).await.unwrap();

    // The thief does not renew: whoever watched the record for its duration takes over.
    let again = tokio::time::timeout(DURATION + SOON, first.acquire(&shutdown)).await.unwrap().unwrap();
    assert_eq!(again.term(), 2);

    // A contender that is told to stop does.
    shutdown.cancel();
    assert!(tokio::time::timeout(SOON, second.acquire(&shutdown)).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_cannot_reach_the_api_server_stops_before_another_may_begin() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let namespace = lab.namespace("leader").unwrap();
    // A relay of our own between the leader and the API server can be cut without hurting the lab.
    let client = lab.client().await.unwrap();
    let relay = Relay::start(&lab).await;
    let cut_client = relay.client(&lab).await;
    let shutdown = CancellationToken::new();
    let first = Election::new(cut_client, settings(namespace.name(), "first")).unwrap();
    let leading = first.acquire(&shutdown).await.unwrap();
    let second = Election::new(client, settings(namespace.name(), "second")).unwrap();
    let contender = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { second.acquire(&shutdown).await }
    });
    // The contender has to see the record before the silence begins.
    tokio::time::sleep(Duration::from_secs(1)).await;
    relay.freeze();

    let lost = leading.lost().clone();
    let loss = tokio::spawn(async move {
        lost.cancelled().await;
        tokio::time::Instant::now()
    });
    let next = tokio::time::timeout(DURATION + SOON, contender).await.unwrap().unwrap().unwrap();
    let began = tokio::time::Instant::now();
    let ended = tokio::time::timeout(SOON, loss).await.unwrap().unwrap();
    assert!(ended < began, "the old leader believed for {:?} beside the new one", ended - began);
    assert_eq!(next.term(), 1);
}

/// Passes bytes to the API server and back until it is frozen; then it keeps its connections open and mute.
struct Relay {
    port: u16,
    frozen: CancellationToken,
}

impl Relay {
    async fn start(lab: &Lab) -> Self {
        let config = config(lab).await;
        let host = config.cluster_url.host().unwrap().to_owned();
        let upstream = (host, config.cluster_url.port_u16().unwrap());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let frozen = CancellationToken::new();
        let seen = frozen.clone();
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let (upstream, seen) = (upstream.clone(), seen.clone());
                tokio::spawn(async move {
                    let mut far = tokio::net::TcpStream::connect(upstream).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        () = seen.cancelled() => std::future::pending::<()>().await,
                    }
                });
            }
        });
        Self { port, frozen }
    }

    fn freeze(&self) {
        self.frozen.cancel();
    }

    async fn client(&self, lab: &Lab) -> kube::Client {
        let mut config = config(lab).await;
        config.cluster_url = format!("https://127.0.0.1:{}/", self.port).parse().unwrap();
        kube::Client::try_from(config).unwrap()
    }
}

async fn config(lab: &Lab) -> kube::Config {
    let kubeconfig = kube::config::Kubeconfig::read_from(lab.kubeconfig()).unwrap();
    kube::Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default())
        .await
        .unwrap()
}
