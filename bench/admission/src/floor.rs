//! The floor of the stack: a minimal admission server after kube-rs' example, with the same TLS settings as howdah and none
//! of its limits, rules, metrics or logs.

use axum::routing::post;
use axum::{Json, Router};
use axum_server::tls_rustls::RustlsConfig;
use clap::Parser;
use kube::ResourceExt as _;
use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

/// How the floor is started.
#[derive(Debug, Parser)]
pub struct Args {
    /// Where to answer.
    #[arg(long)]
    pub listen: SocketAddr,
    /// Where to write the certificate.
    #[arg(long)]
    pub certificate: PathBuf,
}

/// Serves until it is killed.
///
/// # Errors
/// If the address is taken or the certificate cannot be written.
pub async fn serve(args: Args) -> anyhow::Result<()> {
    let router = Router::new().route("/mutate", post(mutate)).route("/validate", post(validate));
    let tls = RustlsConfig::from_config(Arc::new(tls(args.listen.ip(), &args.certificate)?));
    axum_server::bind_rustls(args.listen, tls).http1_only().serve(router.into_make_service()).await?;
    Ok(())
}

/// A P-256 certificate of its own, as howdah's; TLS 1.2 and 1.3, HTTP/1.1.
fn tls(address: IpAddr, file: &std::path::Path) -> anyhow::Result<rustls::ServerConfig> {
    let own = rcgen::generate_simple_self_signed([address.to_string()])?;
    std::fs::write(file, own.cert.pem())?;
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(own.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key.into())?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

type Review = AdmissionReview<DynamicObject>;

/// Adds a label, as the example does.
async fn mutate(Json(review): Json<Review>) -> Json<Review> {
    let request: AdmissionRequest<DynamicObject> = match review.try_into() {
        Ok(request) => request,
        Err(error) => return Json(AdmissionResponse::invalid(format!("{error}")).into_review()),
    };
    let mut response = AdmissionResponse::from(&request);
    if let Some(object) = &request.object
        && !object.labels().contains_key("admission-floor")
    {
        let path = json_patch::jsonptr::PointerBuf::from_tokens(["metadata", "labels", "admission-floor"]);
        let add = json_patch::AddOperation { path, value: "yes".into() };
        let patch = json_patch::Patch(vec![json_patch::PatchOperation::Add(add)]);
        response = match response.with_patch(patch) {
            Ok(response) => response,
            Err(error) => AdmissionResponse::invalid(format!("{error}")),
        };
    }
    Json(response.into_review())
}

/// Allows everything that has a name.
async fn validate(Json(review): Json<Review>) -> Json<Review> {
    let request: AdmissionRequest<DynamicObject> = match review.try_into() {
        Ok(request) => request,
        Err(error) => return Json(AdmissionResponse::invalid(format!("{error}")).into_review()),
    };
    let mut response = AdmissionResponse::from(&request);
    if request.object.is_some_and(|object| object.name_any().is_empty()) {
        response = response.deny("an object needs a name");
    }
    Json(response.into_review())
}
