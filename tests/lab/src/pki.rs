//! The lab's certificates: one CA, a serving certificate for the apiserver, a client certificate for each
//! component and node, and the key that signs service account tokens.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::json;

use crate::lab::Lab;
use crate::netns::BRIDGE_ADDRESS;
use crate::process::write_atomically;

/// The first address of the Service range: the `kubernetes` Service.
const SERVICE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The client as which the apiserver calls admission webhooks.
pub const WEBHOOK_CLIENT: &str = "apiserver-webhook-client";
/// Who speaks for whom: file name, common name, organization.
const CLIENTS: [(&str, &str, Option<&str>); 7] = [
    ("admin", "howdah-lab-admin", Some("system:masters")),
    ("controller-manager", "system:kube-controller-manager", None),
    ("scheduler", "system:kube-scheduler", None),
    ("proxy", "system:kube-proxy", None),
    // Kubelets let the apiserver in by this name; the group is RBAC's shortest way to nodes/proxy.
    ("apiserver-kubelet-client", "kube-apiserver-kubelet-client", Some("system:masters")),
    ("front-proxy-client", "front-proxy-client", None),
    // What the apiserver shows to admission webhooks; those that do not ask never see it.
    (WEBHOOK_CLIENT, "kube-apiserver-webhook-client", None),
];

/// A certificate and its key, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The certificate.
    pub certificate: String,
    /// The private key (PKCS #8).
    pub key: String,
}

/// A file of the lab's PKI, for instance `ca.crt`.
pub fn file(lab: &Lab, name: &str) -> PathBuf {
    lab.path("pki").join(name)
}

/// Makes all certificates that are missing. The CA's certificate is written last: it marks the set as whole.
pub fn create(lab: &Lab) -> Result<()> {
    if file(lab, "ca.crt").is_file() {
        return Ok(());
    }
    fs::create_dir_all(lab.path("pki")).context("create the folder for certificates")?;
    let ca_key = KeyPair::generate().context("generate the CA's key")?;
    let mut ca = CertificateParams::default();
    ca.distinguished_name = name("howdah-lab", None);
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let ca_certificate = ca.self_signed(&ca_key).context("sign the CA's certificate")?;
    write_secret(lab, "ca.key", &ca_key.serialize_pem())?;
    let issuer = Issuer::new(ca, ca_key);

    let mut serving = subject("kube-apiserver", None);
    for address in [BRIDGE_ADDRESS, SERVICE_ADDRESS, Ipv4Addr::LOCALHOST] {
        serving.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(address)));
    }
    for host in ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"] {
        let host = host.try_into().context("write a DNS name into a certificate")?;
        serving.subject_alt_names.push(SanType::DnsName(host));
    }
    serving.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    write_credentials(lab, "apiserver", &sign(serving, &issuer)?)?;
    for (name, user, group) in CLIENTS {
        write_credentials(lab, name, &sign(subject(user, group), &issuer)?)?;
    }
    let tokens = KeyPair::generate().context("generate the service account key")?;
    write_secret(lab, "service-account.pub", &tokens.public_key_pem())?;
    write_secret(lab, "service-account.key", &tokens.serialize_pem())?;
    write_secret(lab, "ca.crt", &ca_certificate.pem())
}

/// Credentials of the node `name` at `address`: its user is `system:node:NAME`, and the same certificate
/// serves its kubelet.
pub fn node_credentials(lab: &Lab, name: &str, address: Ipv4Addr) -> Result<Credentials> {
    let key = KeyPair::from_pem(&read(lab, "ca.key")?).context("read the CA's key")?;
    let issuer = Issuer::from_ca_cert_pem(&read(lab, "ca.crt")?, key).context("read the CA's certificate")?;
    let mut node = subject(&format!("system:node:{name}"), Some("system:nodes"));
    node.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(address)));
    node.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    sign(node, &issuer)
}

/// Credentials of one of the lab's fixed clients, for instance `proxy`.
pub fn client_credentials(lab: &Lab, client: &str) -> Result<Credentials> {
    let certificate = read(lab, &format!("{client}.crt"))?;
    let key = read(lab, &format!("{client}.key"))?;
    Ok(Credentials { certificate, key })
}

/// A kubeconfig (JSON, which is YAML too) for a client with `credentials` that reaches the apiserver at
/// `server`, an https URL. Everything is inside; it refers to no file.
pub fn kubeconfig(lab: &Lab, server: &str, credentials: &Credentials) -> Result<String> {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "lab", "cluster": {
            "server": server,
            "certificate-authority-data": base64(&read(lab, "ca.crt")?),
        }}],
        "users": [{ "name": "lab", "user": {
            "client-certificate-data": base64(&credentials.certificate),
            "client-key-data": base64(&credentials.key),
        }}],
        "contexts": [{ "name": "lab", "context": { "cluster": "lab", "user": "lab" } }],
        "current-context": "lab",
    });
    serde_json::to_string_pretty(&config).context("write a kubeconfig")
}

fn subject(common_name: &str, organization: Option<&str>) -> CertificateParams {
    // The default validity outlives every lab; a lab tests howdah's rotation, not its own.
    let mut params = CertificateParams::default();
    params.distinguished_name = name(common_name, organization);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params
}

fn name(common_name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    if let Some(organization) = organization {
        name.push(DnType::OrganizationName, organization);
    }
    name
}

fn sign(params: CertificateParams, issuer: &Issuer<'_, KeyPair>) -> Result<Credentials> {
    let key = KeyPair::generate().context("generate a key")?;
    let certificate = params.signed_by(&key, issuer).context("sign a certificate")?;
    Ok(Credentials { certificate: certificate.pem(), key: key.serialize_pem() })
}

fn write_credentials(lab: &Lab, name: &str, credentials: &Credentials) -> Result<()> {
    write_secret(lab, &format!("{name}.crt"), &credentials.certificate)?;
    write_secret(lab, &format!("{name}.key"), &credentials.key)
}

fn write_secret(lab: &Lab, name: &str, pem: &str) -> Result<()> {
    write_atomically(&file(lab, name), pem.as_bytes())
}

fn read(lab: &Lab, name: &str) -> Result<String> {
    let path = file(lab, name);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

fn base64(text: &str) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(text)
}
