//! Clients that are broken, slow, greedy or not let in, against the real process over TLS.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics, in its helpers too")]

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use howdah_lab::pki;
use howdah_lab::process::wait_until;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};

use crate::certs::protected;
use crate::webhook::{Webhook, post, post_head, read_answer, tcp_connect, tls_connect, tls_post};

/// What is left of the largest reviews when they are over: 43 to 50 MiB were seen of a debug build, and 66 to 267 without
/// the deployment's `MIMALLOC_PURGE_DELAY`.
const GIVEN_BACK_KIB: u64 = 60 * 1024;
/// Memory is given back after milliseconds; the rest is for a busy machine.
const GIVE_BACK_LIMIT: Duration = Duration::from_secs(3);
/// The memory limit of the deployment (deploy/base/webhook-deployment.yaml).
const MEMORY_LIMIT_KIB: u64 = 384 * 1024;

/// A ClientHello of TLS 1.`minor`, for an ECDSA certificate on P-256.
fn client_hello(minor: u8) -> Vec<u8> {
    let mut hello = vec![3, minor + 1];
    hello.extend([7; 32]);
    // No session; the suites TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 and, for older versions, .._CBC_SHA; no compression.
    hello.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x09, 1, 0]);
    // Signatures: ecdsa_secp256r1_sha256. Groups: secp256r1.
    hello.extend([0, 16, 0, 13, 0, 4, 0, 2, 4, 3, 0, 10, 0, 4, 0, 2, 0, 23]);
    let length = u8::try_from(hello.len()).unwrap();
    let mut record = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(hello);
    record
}

/// Whatever the server says until it closes the connection; a reset counts as that.
fn until_closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return said,
            Ok(length) => said.extend(&buffer[..length]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return said,
            Err(error) => panic!("the connection stays open: {error}"),
        }
    }
}

/// Whether the connection ends, or answers something other than success, while a reader waits.
fn assert_refused(answer: std::io::Result<String>) {
    match answer {
        Ok(answer) => assert!(!answer.contains(" 200 "), "{answer}"),
        Err(error) => assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the connection stays open"),
    }
}

fn review(object: &Value) -> Vec<u8> {
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "1",
            "resource": {"group": "apps", "version": "v1", "resource": "statefulsets"},
            "operation": "CREATE",
            "namespace": "hostile",
            "object": object,
        },
    })
    .to_string()
    .into_bytes()
}

#[tokio::test]
async fn broken_and_slow_clients_are_cut_off_and_disturb_nobody() {
    let webhook = Webhook::start(&[]).await;
    let bundle = webhook.bundles().await.remove(0);
    let (lab, address) = (&webhook.lab, webhook.replica(0).reviews);
    let tcp = || tcp_connect(lab, address).unwrap();
    let tls = || tls_connect(lab, address, &bundle, None).unwrap();
    // Shake hands, and say nothing more, or begin a head that never ends. They keep their places longer than this test takes
    // (`Limits::idle`): the API server does the first, too.
    let mut shaken: Vec<_> = (0..20).map(|_| tls()).collect();
    for (i, stream) in shaken.iter_mut().enumerate() {
        stream.conn.complete_io(&mut stream.sock).unwrap();
        if i % 2 == 0 {
            stream.write_all(b"POST /validate HTTP/1.1\r\nhost: w").unwrap();
        }
    }
    std::thread::scope(|scope| {
        // Says nothing.
        scope.spawn(|| assert_eq!(until_closed(&mut tcp()), b""));
        // Says half of a hello.
        scope.spawn(|| {
            let mut stream = tcp();
            stream.write_all(&client_hello(2)[..20]).unwrap();
            assert_eq!(until_closed(&mut stream), b"");
        });
        // Hangs up its side.
        scope.spawn(|| {
            let mut stream = tcp();
            stream.shutdown(Shutdown::Write).unwrap();
            assert_eq!(until_closed(&mut stream), b"");
        });
        // Speaks HTTP without TLS: an alert is all there is to say, and it ends there.
        scope.spawn(|| {
            let mut stream = tcp();
            stream.write_all(post_head("/validate", 0).as_bytes()).unwrap();
            let said = until_closed(&mut stream);
            assert!(said.len() < 64 && !said.starts_with(b"HTTP"), "{said:?}");
        });
        // Speaks a version of TLS that is not spoken any more: alert 70, protocol_version.
        scope.spawn(|| {
            let mut stream = tcp();
            stream.write_all(&client_hello(1)).unwrap();
            let said = until_closed(&mut stream);
            assert!(said.starts_with(&[21]) && said.ends_with(&[2, 70]), "{said:?}");
        });
        // The same in the oldest version that is: a record of the handshake, and the end when nothing comes back.
        scope.spawn(|| {
            let mut stream = tcp();
            stream.write_all(&client_hello(2)).unwrap();
            let said = until_closed(&mut stream);
            assert!(said.starts_with(&[22, 3, 3]), "{said:?}");
        });
        // Never ends the body.
        scope.spawn(|| {
            let mut stream = tls();
            stream.write_all(post_head("/validate", 1_000_000).as_bytes()).unwrap();
            for _ in 0..40 {
                stream.write_all(b"x").and_then(|()| stream.flush()).unwrap();
                std::thread::sleep(Duration::from_millis(50));
            }
            let answer = read_answer(&mut stream).unwrap();
            assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("within 4 s"), "{answer}");
        });
        // Promises more than it sends.
        scope.spawn(|| {
            let mut stream = tls();
            stream.write_all(post_head("/validate", 1000).as_bytes()).unwrap();
            stream.write_all(b"{").unwrap();
            stream.conn.send_close_notify();
            stream.conn.complete_io(&mut stream.sock).unwrap();
            stream.sock.shutdown(Shutdown::Write).unwrap();
            assert_refused(read_answer(&mut stream));
        });
        // Meanwhile others are served.
        for _ in 0..20 {
            let answer = tls_post(lab, address, &bundle, "/validate", &review(&protected("pg"))).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    assert!(!webhook.output(0).contains("panicked"));
}

#[tokio::test]
async fn a_thousand_idle_connections_do_not_stop_a_review() {
    let webhook = Webhook::start(&[]).await;
    let bundle = webhook.bundles().await.remove(0);
    let (lab, address) = (&webhook.lab, webhook.replica(0).reviews);
    let mut silent = Vec::new();
    let mut shaken = Vec::new();
    for i in 0..1000 {
        if i % 4 == 0 {
            let mut stream = tls_connect(lab, address, &bundle, None).unwrap();
            // One that lost its place meanwhile is as good.
            let _ = stream.conn.complete_io(&mut stream.sock);
            shaken.push(stream);
        } else {
            silent.push(tcp_connect(lab, address).unwrap());
        }
        if i % 100 == 99 {
            let created = webhook.create("statefulsets", &protected("pg"), true).await;
            assert!(created.passed(), "beside {i} connections: {}", created.message());
            let answer = tls_post(lab, address, &bundle, "/validate", &review(&protected("pg"))).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "beside {i} connections: {answer}");
        }
    }
    let descriptors = std::fs::read_dir(webhook.proc(0).join("fd")).unwrap().count();
    assert!(descriptors < 600, "{descriptors} open files");
    let peak_kib = webhook.status_kib(0, "VmHWM:");
    assert!(peak_kib < MEMORY_LIMIT_KIB / 3, "{peak_kib} KiB at the peak");
}

#[tokio::test]
async fn bodies_that_grow_when_they_are_read_stay_within_the_memory_limit() {
    let webhook = Webhook::start(&["--log", "info"]).await;
    let bundle = webhook.bundles().await.remove(0);
    let (lab, address) = (&webhook.lab, webhook.replica(0).reviews);
    // As large as each may be: a little more is refused.
    let bombs = [
        ("[", "0,", "0]", 866_000),
        ("[", r#"{"":0},"#, "0]", 220_000),
        ("{", r#""a":{},"#, r#""b":0}"#, 400_000),
    ];
    std::thread::scope(|scope| {
        for (begin, repeated, end, times) in bombs {
            for path in ["/mutate", "/validate"] {
                let bundle = &bundle;
                scope.spawn(move || {
                    let body = |times: usize| {
                        let whole = String::from_utf8(review(&protected("bomb"))).unwrap();
                        let bomb = format!(r#""bomb":{begin}{}{end},"serviceName""#, repeated.repeat(times));
                        whole.replacen(r#""serviceName""#, &bomb, 1).into_bytes()
                    };
                    let answer = tls_post(lab, address, bundle, path, &body(times)).unwrap();
                    let answered = answer.contains(r#""uid":"1""#) || answer.starts_with("HTTP/1.1 503");
                    assert!(answered, "{}", &answer[..answer.len().min(300)]);
                    let answer = tls_post(lab, address, bundle, path, &body(times * 6 / 5)).unwrap();
                    assert!(
                        answer.starts_with("HTTP/1.1 413") && answer.contains("too many values"),
                        "{answer}"
                    );
                });
            }
        }
    });
    let peak_kib = webhook.status_kib(0, "VmHWM:");
    assert!(peak_kib < MEMORY_LIMIT_KIB, "{peak_kib} KiB at the peak");
    let given_back = wait_until(GIVE_BACK_LIMIT, || webhook.status_kib(0, "VmRSS:") < GIVEN_BACK_KIB);
    assert!(given_back, "{} KiB are kept", webhook.status_kib(0, "VmRSS:"));
    let created = webhook.create("statefulsets", &protected("pg"), true).await;
    assert!(created.passed(), "{}", created.message());
}

/// A certificate and its key of a new authority, and that authority.
fn foreign_client() -> (String, String, String) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["foreign".to_owned()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = params.signed_by(&key, &issuer).unwrap().pem();
    (certificate, key.serialize_pem(), authority)
}

#[tokio::test]
async fn with_a_client_authority_only_its_clients_are_let_in() {
    let webhook = Webhook::absent().await;
    let lab = webhook.lab.clone();
    drop(webhook);
    let authority = std::fs::read_to_string(pki::file(&lab, "ca.crt")).unwrap();
    let own = pki::client_credentials(&lab, pki::WEBHOOK_CLIENT).unwrap();
    let (certificate, key, foreign_authority) = foreign_client();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &authority).unwrap();
    let webhook = Webhook::start(&["--client-ca", file.path().to_str().unwrap()]).await;
    let bundle = webhook.bundles().await.remove(0);
    let address = webhook.replica(0).reviews;
    let send = |identity| {
        let mut tls = tls_connect(&lab, address, &bundle, identity)?;
        post(&mut tls, "/validate", b"")
    };
    let passes = |identity| send(identity).is_ok_and(|answer| answer.starts_with("HTTP/1.1 400"));
    let (own, foreign) =
        (Some((own.certificate.as_str(), own.key.as_str())), Some((certificate.as_str(), key.as_str())));

    // The API server shows its certificate (docs/client-certificates.md); who has none, or another's, is not let in.
    let created = webhook.create("statefulsets", &protected("pg"), true).await;
    assert!(created.passed(), "{}", created.message());
    assert!(passes(own));
    for identity in [None, foreign] {
        assert_refused(send(identity));
    }
    assert!(webhook.output(0).contains("--client-ca is set"), "{}", webhook.output(0));

    // Another authority beside it, without a restart; then that one alone; something unreadable changes nothing.
    std::fs::write(file.path(), format!("{authority}{foreign_authority}")).unwrap();
    webhook.eventually("the other client is let in, too", || async { passes(foreign) }).await;
    assert!(passes(own));
    std::fs::write(file.path(), &foreign_authority).unwrap();
    webhook.eventually("the first client is not let in any more", || async { !passes(own) }).await;
    assert!(passes(foreign));
    std::fs::write(file.path(), "nothing").unwrap();
    webhook
        .eventually("the file is found unreadable", || async {
            webhook.output(0).contains("keeping the client authorities")
        })
        .await;
    assert!(passes(foreign) && !passes(own));
}
