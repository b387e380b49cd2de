//! The certificate authority and the leaves it issues. No IO, no clock.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;

/// Key of the Secret with the trusted authorities, newest first.
pub const BUNDLE_KEY: &str = "ca.crt";
/// Key of the Secret with the private key of the newest authority.
pub const PRIVATE_KEY: &str = "ca.key";
/// Authorities that are trusted at a time, at most: one that serves, one that leaves, and one to spare.
const AUTHORITIES_MAX: usize = 3;
/// How far back a certificate starts to be valid: clocks differ.
const BACKDATE: Duration = Duration::from_secs(300);

/// How long certificates live. Each is renewed when a third of its life is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetimes {
    /// An authority.
    pub authority: Duration,
    /// A leaf; the end of its authority ends it, too.
    pub leaf: Duration,
    /// How long API servers may take to notice a new `caBundle` before a leaf depends on it.
    pub settle: Duration,
}

impl Default for Lifetimes {
    fn default() -> Self {
        const DAY_S: u64 = 24 * 3600;
        Self {
            authority: Duration::from_secs(365 * DAY_S),
            leaf: Duration::from_secs(7 * DAY_S),
            settle: Duration::from_secs(15),
        }
    }
}

/// Why there is no certificate.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// The Secret was installed empty and nobody has filled it yet.
    #[error("the Secret holds no authority yet")]
    Empty,
    /// The Secret holds something else.
    #[error("read the authority from the Secret: {0}")]
    Unreadable(String),
    /// All of its authorities have ended.
    #[error("the newest authority in the Secret ended at {0}")]
    Ended(Timestamp),
    /// A certificate could not be made.
    #[error("make a certificate")]
    Make(#[from] rcgen::Error),
    /// The made certificate could not be read.
    #[error("read the certificate just made")]
    Pem(#[from] rustls::pki_types::pem::Error),
}

/// A certificate of an authority.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Trusted {
    pem: String,
    not_after: Timestamp,
}

/// The authority that signs, and those that are trusted beside it.
#[derive(Clone)]
pub struct Authority {
    private_key_pem: String,
    /// Newest first; the first signs.
    trusted: Vec<Trusted>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("trusted", &self.trusted).finish_non_exhaustive()
    }
}

/// A serving certificate with its key.
#[derive(Debug)]
pub struct Leaf {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Its private key.
    pub private_key: PrivateKeyDer<'static>,
    /// When it ends.
    pub not_after: Timestamp,
}

impl Authority {
    /// Makes a new authority.
    ///
    /// # Errors
    /// If no key can be made.
    pub fn generate(lifetimes: &Lifetimes, now: Timestamp) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        // Told apart by name as well as by key, for whoever reads the bundle.
        params.distinguished_name.push(DnType::CommonName, format!("howdah webhook authority {now}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let not_after = whole_seconds(now + lifetimes.authority);
        // rcgen's type of time is of a crate that we do not use otherwise; this way it needs no name.
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        params.not_before = epoch + since_epoch(now - BACKDATE);
        params.not_after = epoch + since_epoch(not_after);
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { private_key_pem: key.serialize_pem(), trusted: vec![Trusted { pem, not_after }] })
    }

    /// Reads the authority from the data of its Secret, without those that have ended.
    ///
    /// # Errors
    /// If the Secret is empty, unreadable, or all in it have ended.
    pub fn from_secret(data: &BTreeMap<String, ByteString>, now: Timestamp) -> Result<Self, AuthorityError> {
        let text = |key: &str| data.get(key).map(|value| String::from_utf8_lossy(&value.0).into_owned());
        let (bundle, private_key_pem) = match (text(BUNDLE_KEY), text(PRIVATE_KEY)) {
            (None, None) => return Err(AuthorityError::Empty),
            (Some(bundle), Some(key)) => (bundle, key),
            _ => return Err(unreadable(format!("it holds only one of {BUNDLE_KEY} and {PRIVATE_KEY}"))),
        };
        let key = KeyPair::from_pem(&private_key_pem).map_err(unreadable)?;
        let mut trusted = Vec::new();
        for (i, pem) in x509_parser::pem::Pem::iter_from_buffer(bundle.as_bytes()).enumerate() {
            let pem = pem.map_err(unreadable)?;
            let certificate = pem.parse_x509().map_err(unreadable)?;
            if i == 0 && certificate.public_key().subject_public_key.data != key.public_key_raw() {
                return Err(unreadable("its key is not that of its newest certificate"));
            }
            let not_after =
                Timestamp::from_second(certificate.validity().not_after.timestamp()).map_err(unreadable)?;
            if i == 0 && not_after <= now {
                return Err(AuthorityError::Ended(not_after));
            }
            let pem = pem_of(&pem.contents);
            if not_after > now && i < AUTHORITIES_MAX {
                trusted.push(Trusted { pem, not_after });
            }
        }
        if trusted.is_empty() {
            return Err(unreadable("it holds no certificate"));
        }
        Ok(Self { private_key_pem, trusted })
    }

    /// The data of the Secret.
    #[must_use]
    pub fn to_secret(&self) -> BTreeMap<String, ByteString> {
        [(BUNDLE_KEY, self.bundle()), (PRIVATE_KEY, self.private_key_pem.clone())]
            .map(|(key, value)| (key.to_owned(), ByteString(value.into_bytes())))
            .into()
    }

    /// A new authority that signs from now on; those of before stay trusted until they end.
    ///
    /// # Errors
    /// If no key can be made.
    pub fn renewed(&self, lifetimes: &Lifetimes, now: Timestamp) -> Result<Self, AuthorityError> {
        let mut new = Self::generate(lifetimes, now)?;
        let still_trusted = self.trusted.iter().filter(|old| old.not_after > now).cloned();
        new.trusted.extend(still_trusted.take(AUTHORITIES_MAX - 1));
        Ok(new)
    }

    /// When the signing authority is to be renewed.
    #[must_use]
    pub fn renew_at(&self, lifetimes: &Lifetimes) -> Timestamp {
        self.not_after() - lifetimes.authority / 3
    }

    /// When the signing authority ends.
    #[must_use]
    pub fn not_after(&self) -> Timestamp {
        self.trusted.first().map_or(Timestamp::MIN, |newest| newest.not_after)
    }

    /// The certificate of the signing authority; it also tells authorities apart.
    #[must_use]
    pub fn issuer(&self) -> &str {
        self.trusted.first().map_or("", |newest| newest.pem.as_str())
    }

    /// What `caBundle` has to hold.
    #[must_use]
    pub fn bundle(&self) -> String {
        self.trusted.iter().map(|trusted| trusted.pem.as_str()).collect()
    }

    /// Issues a leaf for these DNS names and IP addresses.
    ///
    /// # Errors
    /// If a name cannot stand in a certificate, or no key can be made.
    pub fn issue(
        &self,
        names: &[String],
        lifetimes: &Lifetimes,
        now: Timestamp,
    ) -> Result<Leaf, AuthorityError> {
        let issuer = Issuer::from_ca_cert_pem(self.issuer(), KeyPair::from_pem(&self.private_key_pem)?)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names.to_vec())?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "howdah webhook");
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let not_after = whole_seconds(now + lifetimes.leaf).min(self.not_after());
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        params.not_before = epoch + since_epoch(now - BACKDATE);
        params.not_after = epoch + since_epoch(not_after);
        let certificate = params.signed_by(&key, &issuer)?.der().clone();
        let private_key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes())?;
        Ok(Leaf { certificate, private_key, not_after })
    }
}

fn unreadable(problem: impl ToString) -> AuthorityError {
    AuthorityError::Unreadable(problem.to_string())
}

/// Certificates know no fractions of a second.
fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

/// Seconds since 1970, which is what a certificate can say.
fn since_epoch(time: Timestamp) -> Duration {
    Duration::from_secs(time.as_second().max(0).unsigned_abs())
}

/// One PEM block, always written the same way, so that bundles can be compared as text.
fn pem_of(der: &[u8]) -> String {
    use base64::Engine as _;
    const LINE: usize = 64;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(LINE) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

#[cfg(test)]
mod tests {
    use super::*;
    use x509_parser::prelude::FromDer as _;

    const LIVES: Lifetimes = Lifetimes {
        authority: Duration::from_secs(3000),
        leaf: Duration::from_secs(900),
        settle: Duration::ZERO,
    };

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn names() -> Vec<String> {
        vec!["howdah-webhook.howdah-system.svc".to_owned(), "10.77.0.1".to_owned()]
    }

    #[test]
    fn an_authority_survives_its_secret() {
        let authority = Authority::generate(&LIVES, at(0)).unwrap();
        let read = Authority::from_secret(&authority.to_secret(), at(1)).unwrap();
        assert_eq!(read.trusted, authority.trusted);
        assert_eq!(read.bundle(), authority.bundle());
        assert_eq!(read.not_after(), at(3000));
        assert_eq!(read.renew_at(&LIVES), at(2000));
    }

    #[test]
    fn a_leaf_is_signed_by_the_newest_and_never_outlives_it() {
        let old = Authority::generate(&LIVES, at(0)).unwrap();
        let new = old.renewed(&LIVES, at(2000)).unwrap();
        assert_eq!(new.trusted.len(), 2);
        assert_ne!(new.issuer(), old.issuer());
        let leaf = new.issue(&names(), &LIVES, at(2000)).unwrap();
        assert_eq!(leaf.not_after, at(2900));
        assert_eq!(new.issue(&names(), &LIVES, at(4900)).unwrap().not_after, at(5000));
        let (_, certificate) = x509_parser::prelude::X509Certificate::from_der(&leaf.certificate).unwrap();
        for (authority, signs) in [(&new, true), (&old, false)] {
            let issuer = x509_parser::pem::parse_x509_pem(authority.issuer().as_bytes()).unwrap().1;
            let issuer = issuer.parse_x509().unwrap();
            assert_eq!(certificate.issuer() == issuer.subject(), signs);
        }
    }

    #[test]
    fn an_ended_authority_leaves_the_bundle() {
        let old = Authority::generate(&LIVES, at(0)).unwrap();
        let new = old.renewed(&LIVES, at(2000)).unwrap();
        assert_eq!(Authority::from_secret(&new.to_secret(), at(2999)).unwrap().trusted.len(), 2);
        assert_eq!(Authority::from_secret(&new.to_secret(), at(3000)).unwrap().trusted.len(), 1);
        let ended = Authority::from_secret(&new.to_secret(), at(5000)).unwrap_err();
        assert!(matches!(ended, AuthorityError::Ended(_)), "{ended}");
    }

    #[test]
    fn the_bundle_does_not_grow_without_end() {
        let mut authority = Authority::generate(&LIVES, at(0)).unwrap();
        for i in 0..10 {
            authority = authority.renewed(&LIVES, at(i)).unwrap();
        }
        assert_eq!(authority.trusted.len(), AUTHORITIES_MAX);
    }

    #[test]
    fn a_foreign_secret_is_told_from_an_empty_one() {
        let read = |data: &BTreeMap<String, ByteString>| Authority::from_secret(data, at(0)).unwrap_err();
        assert!(matches!(read(&BTreeMap::new()), AuthorityError::Empty));
        let mut data = Authority::generate(&LIVES, at(0)).unwrap().to_secret();
        let other = Authority::generate(&LIVES, at(0)).unwrap().to_secret();
        data.insert(PRIVATE_KEY.to_owned(), other[PRIVATE_KEY].clone());
        assert!(read(&data).to_string().contains("not that of its newest certificate"));
        data.insert(BUNDLE_KEY.to_owned(), ByteString(b"nonsense".to_vec()));
        assert!(matches!(read(&data), AuthorityError::Unreadable(_)));
        data.remove(PRIVATE_KEY);
        assert!(read(&data).to_string().contains("only one of"));
    }
}
