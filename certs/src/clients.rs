//! Whose certificates let a client in: authorities in a file, which is read again when it changes.
//!
//! The file is usually a key of a mounted ConfigMap. The kubelet replaces those by swapping a link, which file watches
//! miss or see half done, so the content is compared instead.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Pause between two looks at the file. The kubelet takes up to a minute to change it.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Longest file that is read; an authority takes 1 to 2 KiB.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// The authorities in a file.
#[derive(Debug)]
pub struct ClientAuthority {
    file: PathBuf,
    pem: Vec<u8>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl ClientAuthority {
    /// Reads the file for the first time.
    ///
    /// # Errors
    /// If it cannot be read or holds no certificate: to start without would let everybody in.
    pub fn read(file: PathBuf) -> anyhow::Result<Self> {
        let pem = content(&file)?;
        let verifier =
            verifier(&pem).with_context(|| format!("read client authorities from {}", file.display()))?;
        Ok(Self { file, pem, verifier })
    }

    /// Lets those in who have a certificate of one of these authorities.
    #[must_use]
    pub fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::clone(&self.verifier)
    }

    /// Hands a new verifier to `changed` whenever the file holds something else. What cannot be read changes nothing.
    ///
    /// # Errors
    /// If `changed` fails.
    pub async fn run(
        mut self,
        shutdown: CancellationToken,
        changed: impl Fn(Arc<dyn ClientCertVerifier>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut failing = false;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            match self.look() {
                Ok(None) => failing = false,
                Ok(Some(verifier)) => {
                    failing = false;
                    changed(verifier)?;
                    info!(file = %self.file.display(), "client certificates are held against new authorities");
                }
                Err(error) => {
                    if !failing {
                        warn!(
                            error = format!("{error:#}"),
                            "keeping the client authorities that were read before"
                        );
                    }
                    failing = true;
                }
            }
        }
    }

    /// A verifier of what the file holds now, `None` when that is what it held before.
    fn look(&mut self) -> anyhow::Result<Option<Arc<dyn ClientCertVerifier>>> {
        let pem = content(&self.file)?;
        if pem == self.pem {
            return Ok(None);
        }
        let verifier = verifier(&pem)
            .with_context(|| format!("read client authorities from {}", self.file.display()))?;
        self.pem = pem;
        self.verifier = Arc::clone(&verifier);
        Ok(Some(verifier))
    }
}

fn content(file: &Path) -> anyhow::Result<Vec<u8>> {
    use std::io::Read as _;
    let read = || {
        let mut pem = Vec::new();
        std::fs::File::open(file)?.take(FILE_BYTES_MAX).read_to_end(&mut pem)?;
        Ok::<_, std::io::Error>(pem)
    };
    read().with_context(|| format!("read client authorities from {}", file.display()))
}

fn verifier(pem: &[u8]) -> anyhow::Result<Arc<dyn ClientCertVerifier>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        roots.add(certificate.context("read a PEM block")?).context("read a certificate")?;
    }
    if roots.is_empty() {
        bail!("find a certificate in it: there is none; it has to hold PEM blocks BEGIN CERTIFICATE");
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .context("prepare the check of client certificates")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authority(name: &str) -> String {
        rcgen::generate_simple_self_signed([name.to_owned()]).unwrap().cert.pem()
    }

    #[test]
    fn a_file_without_authorities_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.crt");
        for (content, problem) in [
            ("", "there is none"),
            ("hello", "there is none"),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "read a certificate"),
        ] {
            std::fs::write(&file, content).unwrap();
            let error = format!("{:#}", ClientAuthority::read(file.clone()).unwrap_err());
            assert!(error.contains(problem) && error.contains("ca.crt"), "{error}");
        }
        std::fs::remove_file(&file).unwrap();
        assert!(ClientAuthority::read(file).is_err());
    }

    #[test]
    fn a_change_is_seen_once_and_an_unreadable_one_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.crt");
        let (one, two) = (authority("one"), authority("two"));
        std::fs::write(&file, &one).unwrap();
        let mut clients = ClientAuthority::read(file.clone()).unwrap();
        assert_eq!(clients.verifier().root_hint_subjects().len(), 1);
        assert!(clients.look().unwrap().is_none());
        std::fs::write(&file, format!("{one}{two}")).unwrap();
        assert_eq!(clients.look().unwrap().unwrap().root_hint_subjects().len(), 2);
        assert!(clients.look().unwrap().is_none());
        std::fs::write(&file, "half writ").unwrap();
        assert!(clients.look().is_err());
        assert_eq!(clients.verifier().root_hint_subjects().len(), 2);
    }
}
