//! A client that posts reviews as an API server does: HTTP/1.1 over TLS, over a connection that is kept or a new one.
//! And what the webhook that answers them is installed with.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::repository;

/// Longest head of an answer; howdah's are below 200 bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Longest wait for the next bytes. The API server waits 5 s for a whole answer.
const READ_LIMIT: Duration = Duration::from_secs(20);

/// A TLS connection.
pub type Tls = StreamOwned<ClientConnection, TcpStream>;

/// Trusts the authorities of a `caBundle` and nobody else, and shows a client certificate with its key (PEM) where they
/// are given. Sessions are not resumed: API servers do not.
pub fn trust(bundle: &str, identity: Option<(&str, &str)>) -> Result<Arc<ClientConfig>> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        roots.add(certificate.context("read a PEM block")?).context("read an authority")?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("choose TLS versions")?
        .with_root_certificates(roots);
    let mut config = match identity {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let certificate = CertificateDer::from_pem_slice(certificate.as_bytes());
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).context("read the client's key")?;
            config
                .with_client_auth_cert(vec![certificate.context("read the client's certificate")?], key)
                .context("use the client's certificate")?
        }
    };
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// Connects; the handshake happens with the first byte. Must be called in the network namespace of the address.
pub fn connect(address: SocketAddr, trust: Arc<ClientConfig>) -> Result<Tls> {
    let stream = TcpStream::connect_timeout(&address, READ_LIMIT).context("connect")?;
    stream.set_nodelay(true).context("turn delays off")?;
    stream.set_read_timeout(Some(READ_LIMIT)).context("limit waiting")?;
    let session = ClientConnection::new(trust, ServerName::from(address.ip())).context("begin TLS")?;
    Ok(StreamOwned::new(session, stream))
}

/// A whole request, ready to be sent: a POST of `body` after which the connection is kept.
pub fn request(path: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: webhook\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// Whether the server closes the connection after it.
    pub closes: bool,
    /// The body.
    pub body: Vec<u8>,
}

/// A connection that is kept between requests.
#[derive(Debug)]
pub struct Connection {
    stream: Tls,
    buffer: Vec<u8>,
}

impl Connection {
    /// Connects; the handshake happens with the first request.
    pub fn open(address: SocketAddr, trust: Arc<ClientConfig>) -> Result<Self> {
        Ok(Self { stream: connect(address, trust)?, buffer: Vec::new() })
    }

    /// Sends a [`request`] and reads its answer.
    pub fn send(&mut self, request: &[u8]) -> Result<Answer> {
        self.stream.write_all(request).context("send a request")?;
        self.stream.flush().context("send a request")?;
        self.buffer.clear();
        let head_end = loop {
            if let Some(end) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                bail!("read an answer: its head does not end");
            }
            self.read()?;
        };
        let head = String::from_utf8_lossy(&self.buffer[..head_end]).to_ascii_lowercase();
        let value = |name: &str| {
            head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
        };
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        let length: usize =
            value("content-length").and_then(|length| length.parse().ok()).context("find its length")?;
        let closes = value("connection") == Some("close");
        while self.buffer.len() < head_end + length {
            self.read()?;
        }
        let body = self.buffer[head_end..head_end + length].to_vec();
        Ok(Answer { status: status.context("find a status")?, closes, body })
    }

    fn read(&mut self) -> Result<()> {
        const CHUNK: usize = 16 * 1024;
        let start = self.buffer.len();
        self.buffer.resize(start + CHUNK, 0);
        let count = self.stream.read(&mut self.buffer[start..]).context("read an answer")?;
        self.buffer.truncate(start + count);
        if count == 0 {
            bail!("read an answer: the connection ended after {start} bytes");
        }
        Ok(())
    }
}

/// The variables with a plain value that the webhook is installed with: its allocator is set by them, and whoever measures
/// its memory has to have the same.
///
/// # Errors
/// If deploy/base/webhook-deployment.yaml cannot be read, or sets none.
pub fn environment() -> Result<Vec<(String, String)>> {
    let file = "deploy/base/webhook-deployment.yaml";
    let mut found = Vec::new();
    for object in repository::documents(file)? {
        let variables = object["spec"]["template"]["spec"]["containers"][0]["env"].as_array();
        found.extend(variables.into_iter().flatten().filter_map(|variable| {
            Some((variable["name"].as_str()?.to_owned(), variable["value"].as_str()?.to_owned()))
        }));
    }
    ensure!(!found.is_empty(), "find the variables of the webhook in {file}: it sets none");
    Ok(found)
}
