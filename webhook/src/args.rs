//! The configuration of the process, and how it starts and ends.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum_server::tls_rustls::RustlsConfig;
use clap::Parser;
use howdah_adapters::kubernetes::{self, Kubernetes};
use howdah_adapters::leader::{Election, LeaderSettings};
use howdah_adapters::telemetry::{Diagnostics, LogFormat, Readiness};
use howdah_adapters::{shutdown, telemetry};
use howdah_certs::{ClientAuthority, FailClosed, FailOpen, Keeper, Lifetimes};
use howdah_core::names;
use howdah_core::policy::Config;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::NAME;
use crate::audit::Auditor;
use crate::background;
use crate::connections::{self, Limits};
use crate::denials::Denials;
use crate::facts::Cluster;
use crate::http::{self, App};
use crate::lists::Lists;
use crate::metrics::{AuditMetrics, Metrics};

/// What tasks may take after the server has drained; they only have to notice.
const JOIN: Duration = Duration::from_secs(5);

/// Judges StatefulSets that carry the label howdah.dev/protect=true, and fills in safe defaults.
#[derive(Debug, Parser)]
#[command(name = "howdah-webhook", version)]
pub struct Args {
    /// Where reviews are answered, over TLS.
    #[arg(long, env = "HOWDAH_LISTEN", default_value = "0.0.0.0:8443")]
    pub listen: SocketAddr,
    /// Where /healthz, /readyz and /metrics are answered, in plain HTTP.
    #[arg(long, env = "HOWDAH_DIAGNOSTICS", default_value = "0.0.0.0:8080")]
    pub diagnostics: SocketAddr,
    /// The namespace howdah runs in.
    #[arg(long, env = "POD_NAMESPACE", default_value = names::NAMESPACE)]
    pub namespace: String,
    /// The Service in front of the webhook; its DNS name stands in the certificate.
    #[arg(long, env = "HOWDAH_SERVICE", default_value = "howdah-webhook")]
    pub service: String,
    /// Another DNS name or IP address for the certificate; may be given several times.
    #[arg(long = "name", env = "HOWDAH_NAMES", value_delimiter = ',')]
    pub names: Vec<String>,
    /// The Secret with the certificate authority.
    #[arg(long, env = "HOWDAH_CA_SECRET", default_value = "howdah-webhook-ca")]
    pub ca_secret: String,
    /// The name of both webhook configurations.
    #[arg(long, env = "HOWDAH_CONFIGURATION", default_value = "howdah")]
    pub configuration: String,
    /// The StorageClass for claim templates of protected StatefulSets that name none.
    #[arg(long, env = "HOWDAH_STORAGE_CLASS")]
    pub storage_class: Option<String>,
    /// The shortest terminationGracePeriodSeconds that passes.
    #[arg(long, env = "HOWDAH_MINIMUM_GRACE_SECONDS", default_value_t = Config::default().minimum_grace_s,
          value_parser = clap::value_parser!(i64).range(1..))]
    pub minimum_grace_seconds: i64,
    /// How long the certificate authority lives.
    #[arg(long, env = "HOWDAH_CA_LIFETIME_SECONDS", default_value_t = Lifetimes::default().authority.as_secs(),
          value_parser = clap::value_parser!(u64).range(6..=10 * 365 * 24 * 3600))]
    pub ca_lifetime_seconds: u64,
    /// How long the serving certificate of a replica lives.
    #[arg(long, env = "HOWDAH_CERTIFICATE_LIFETIME_SECONDS", default_value_t = Lifetimes::default().leaf.as_secs(),
          value_parser = clap::value_parser!(u64).range(3..=365 * 24 * 3600))]
    pub certificate_lifetime_seconds: u64,
    /// How long API servers may take to notice a new caBundle.
    #[arg(long, env = "HOWDAH_SETTLE_SECONDS", default_value_t = Lifetimes::default().settle.as_secs())]
    pub settle_seconds: u64,
    /// A PEM file with the authorities of the clients that may connect; without it anyone may. Read again when it changes.
    #[arg(long, env = "HOWDAH_CLIENT_CA")]
    pub client_ca: Option<PathBuf>,
    /// Unique name of this replica in the election of the one that does the background work; the name of the pod.
    #[arg(long, env = "POD_NAME", default_value = "howdah-webhook-local")]
    pub identity: String,
    /// Seconds between two looks of the audit at all protected StatefulSets; 0 turns it off.
    #[arg(long, env = "HOWDAH_AUDIT_INTERVAL_SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(..=24 * 3600))]
    pub audit_interval_seconds: u64,
    /// How long to serve on after SIGTERM, until no API server sends new requests.
    #[arg(long, env = "HOWDAH_PROPAGATION_SECONDS", default_value_t = 10)]
    pub propagation_seconds: u64,
    /// How long open requests may take after that.
    #[arg(long, env = "HOWDAH_DRAIN_SECONDS", default_value_t = 15)]
    pub drain_seconds: u64,
    /// A kubeconfig; without it, as kubectl finds one, or the service account of the pod.
    #[arg(long, env = "HOWDAH_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// text or json.
    #[arg(long, env = "HOWDAH_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Which log lines are written, e.g. info or info,howdah_webhook=debug.
    #[arg(long, env = "HOWDAH_LOG", default_value = "info")]
    pub log: String,
}

impl Args {
    /// Serves until a signal, then drains: not ready, serve on until nobody sends more, finish what is open, join.
    ///
    /// Waits itself: a future is compiled where it is first polled, and all of this would be a second time for `main`.
    ///
    /// # Errors
    /// If an address is taken, the cluster is unreachable, or a task ends by itself.
    pub fn run(self) -> anyhow::Result<()> {
        Runtime::new().context("start the runtime")?.block_on(self.serve())
    }

    async fn serve(self) -> anyhow::Result<()> {
        // Every field by name: one that is not used does not compile.
        let Self {
            listen,
            diagnostics,
            namespace,
            service,
            mut names,
            ca_secret,
            configuration,
            storage_class,
            minimum_grace_seconds,
            ca_lifetime_seconds,
            certificate_lifetime_seconds,
            settle_seconds,
            client_ca,
            identity,
            audit_interval_seconds,
            propagation_seconds,
            drain_seconds,
            kubeconfig,
            log_format: _,
            log: _,
        } = self;
        let (propagation, drain) =
            (Duration::from_secs(propagation_seconds), Duration::from_secs(drain_seconds));
        let signal = shutdown::on_signal()?;
        let readiness = Readiness::new();
        let mut registry = telemetry::registry("webhook", env!("CARGO_PKG_VERSION"));
        let client = kubernetes::connect(kubeconfig.as_deref()).await?;

        names.extend([
            format!("{service}.{namespace}.svc"),
            format!("{service}.{namespace}.svc.cluster.local"),
        ]);
        let config =
            Config { storage_class, minimum_grace_s: minimum_grace_seconds, namespace: namespace.clone() };
        let fail_open = FailOpen::register(&mut registry);
        let fail_closed = FailClosed::new(
            client.clone(),
            namespace.clone(),
            configuration.clone(),
            readiness.clone(),
            fail_open,
        );
        let lease = LeaderSettings::new(&namespace, NAME, &identity);
        let election = Election::new(client.clone(), lease)?;
        let settings = howdah_certs::Settings {
            namespace,
            secret: ca_secret,
            configuration,
            names,
            lifetimes: Lifetimes {
                authority: Duration::from_secs(ca_lifetime_seconds),
                leaf: Duration::from_secs(certificate_lifetime_seconds),
                settle: Duration::from_secs(settle_seconds),
            },
        };
        let certificates = howdah_certs::Metrics::register(&mut registry);
        let keeper = Keeper::new(client.clone(), settings, certificates, readiness.gate("certificates"));
        let audited = AuditMetrics::register(&mut registry);
        let every = Duration::from_secs(audit_interval_seconds);
        let auditor =
            (!every.is_zero()).then(|| Auditor::new(client.clone(), config.clone(), audited.clone(), every));
        let (cluster, caches) = Cluster::new(client.clone(), config, readiness.gate("caches"));
        let lists = Lists::new(client.clone(), cluster.protected());
        let metrics = Metrics::register(&mut registry);
        let (denials, publisher) = Denials::new(metrics.clone());
        let app = App::new(cluster, metrics, denials);

        let serving = readiness.gate("serving");
        let diagnostics = Diagnostics::bind(diagnostics, registry, readiness).await?;
        let clients = client_ca.map(ClientAuthority::read).transpose()?;
        let certificate = keeper.serving();
        let verifier = clients.as_ref().map(ClientAuthority::verifier);
        let tls = RustlsConfig::from_config(Arc::new(certificate.server_config(verifier)?));
        let listener = TcpListener::bind(listen).with_context(|| format!("bind the webhook to {listen}"))?;
        let handle = axum_server::Handle::new();
        let server = connections::server(listener, tls.clone(), &Limits::default())
            .context("listen for reviews")?
            .accept_error_handler(connections::report_failures(clients.is_some()))
            .handle(handle.clone())
            .serve(http::router(app.clone()).into_make_service());
        serving.open();
        info!(%listen, "answering reviews");

        // Health and metrics are answered until the last review is.
        let drained = CancellationToken::new();
        let mut tasks = shutdown::Tasks::new(signal.clone());
        tasks.spawn("caches", caches.run(signal.clone()));
        tasks.spawn("certificates", keeper.run(signal.clone()));
        tasks.spawn("fail-closed", fail_closed.run(signal.clone()));
        tasks.spawn("denials", publisher.run(Kubernetes::new(client, NAME), signal.clone()));
        let background = background::run(election, lists, auditor, audited.leading, signal.clone());
        tasks.spawn("background", background);
        tasks.spawn("diagnostics", diagnostics.serve(drained.clone()));
        if let Some(clients) = clients {
            tasks.spawn(
                "client authority",
                clients.run(signal.clone(), move |verifier| {
                    tls.reload_from_config(Arc::new(certificate.server_config(Some(verifier))?));
                    Ok(())
                }),
            );
        }
        tasks.spawn("drain", async move {
            signal.cancelled().await;
            serving.close();
            app.close_connections();
            tokio::time::sleep(propagation).await;
            handle.graceful_shutdown(Some(drain));
            Ok(())
        });
        tasks.spawn("reviews", async move {
            let ended = server.await.context("answer reviews");
            drained.cancel();
            ended
        });
        tasks.run(propagation + drain + JOIN).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_arguments_are_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn nonsense_is_refused() {
        for flags in [["--minimum-grace-seconds", "0"], ["--listen", "8443"], ["--ca-lifetime-seconds", "1"]]
        {
            assert!(Args::try_parse_from(["howdah-webhook"].into_iter().chain(flags)).is_err(), "{flags:?}");
        }
    }
}
