//! The PostgreSQL adapter against a real server.

use std::time::Duration;

use howdah_adapters::postgres::{BackupLimits, PostgresError, Session};
use howdah_lab::postgres::{DEBIAN_MAJOR, MAJORS};
use howdah_lab::process::wait_until;

use crate::server::{PASSWORD, Server};

/// The server notices a closed connection at once; this allows for a busy machine.
const NOTICE_LIMIT: Duration = Duration::from_secs(30);
/// What the server writes when a session in backup mode ends (PostgreSQL: `do_pg_abort_backup`); the name of the
/// function that follows changed with version 15.
const ABORTED: &str = "aborting backup due to backend exiting before";

fn crypto() {
    // Fails only when another test of this process installed it, which is what we want.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_major_version_reports_itself_and_where_a_backup_began_and_ended() {
    crypto();
    for major in MAJORS {
        let server = Server::start_version(major, "archive_mode = on\narchive_command = 'false'", &[]);
        let session = Session::connect(&server.target("postgres", PASSWORD)).await.unwrap();
        let facts = session.facts().await.unwrap();
        assert!(facts.version.starts_with(&format!("{major}.")), "{facts:?}");
        assert_eq!(facts.version_num.unsigned_abs() / 10_000, major);
        assert_eq!(facts.timeline, 1);
        assert!(facts.system_identifier.parse::<u64>().unwrap() > 0);
        assert_eq!(facts.data_directory, server.data_directory().to_str().unwrap());
        assert!(facts.fsync && facts.full_page_writes && !facts.in_recovery && !facts.exclusive_backup);
        assert_eq!((facts.archive_mode.as_str(), facts.tablespaces.len()), ("on", 0));

        let backup = session.start_backup("howdah pg-20261122030000", BackupLimits::default()).await.unwrap();
        let start_lsn = backup.start_lsn().to_owned();
        // The archiver always fails: stop must not wait for it.
        let end = backup.stop().await.unwrap();
        assert!(end.label.contains("LABEL: howdah pg-20261122030000"), "{major}: {}", end.label);
        assert!(end.label.contains(&format!("START WAL LOCATION: {start_lsn}")), "{major}: {}", end.label);
        assert_ne!(end.stop_lsn, start_lsn);
        assert!(!server.log().contains(ABORTED), "{}", server.log());

        // A session that is dropped leaves no backup mode.
        let session = Session::connect(&server.target("postgres", PASSWORD)).await.unwrap();
        let dropped = session.start_backup("first", BackupLimits::default()).await.unwrap();
        let superuser = server.superuser().await;
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'howdah'";
        assert_eq!(superuser.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0), 1);
        drop(dropped);
        assert!(wait_until(NOTICE_LIMIT, || server.log().contains(ABORTED)), "{}", server.log());
        assert_eq!(superuser.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0), 0);
        let session = Session::connect(&server.target("postgres", PASSWORD)).await.unwrap();
        session.start_backup("second", BackupLimits::default()).await.unwrap().stop().await.unwrap();
        assert_eq!(server.log().matches(ABORTED).count(), 1, "{}", server.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_dropped_during_the_checkpoint_leaves_no_backup_mode() {
    crypto();
    let server = Server::start("", &[]);
    let superuser = server.superuser().await;
    // Something to write out, so that the checkpoint takes a while.
    superuser
        .batch_execute("CREATE TABLE t AS SELECT g, repeat('x', 200) FROM generate_series(1, 200000) g")
        .await
        .unwrap();
    let session = Session::connect(&server.target("postgres", PASSWORD)).await.unwrap();
    let starting = session.start_backup("cut", BackupLimits::default());
    // Whether the cut falls into the checkpoint or, on a fast machine, after it: nothing may remain.
    let _ = tokio::time::timeout(Duration::from_millis(5), starting).await;
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'howdah'";
    let mut left = i64::MAX;
    for _ in 0..NOTICE_LIMIT.as_secs() * 10 {
        left = superuser.query_one(sessions, &[]).await.unwrap().get(0);
        if left == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(left, 0, "{}", server.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_ends_backup_mode_when_we_freeze_and_stop_says_so() {
    crypto();
    let server = Server::start("", &[]);
    let session = Session::connect(&server.target("postgres", PASSWORD)).await.unwrap();
    let limits = BackupLimits { snapshot: Duration::from_millis(300), ..BackupLimits::default() };
    let backup = session.start_backup("frozen", limits).await.unwrap();
    assert!(wait_until(NOTICE_LIMIT, || server.log().contains(ABORTED)), "{}", server.log());
    let error = backup.stop().await.unwrap_err();
    assert!(matches!(error, PostgresError::SessionLost { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_crashes_during_the_backup_is_a_lost_session() {
    crypto();
    let mut server = Server::start("", &[]);
    let session = Session::connect(&server.target("postgres", PASSWORD)).await.unwrap();
    let backup = session.start_backup("crash", BackupLimits::default()).await.unwrap();
    server.crash();
    let error = backup.stop().await.unwrap_err();
    assert!(matches!(error, PostgresError::SessionLost { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_right_names_the_statement_that_grants_it() {
    crypto();
    // The functions have other names and arguments before version 15.
    for major in [14, DEBIAN_MAJOR] {
        let server = Server::start_version(major, "", &[]);
        let superuser = server.superuser().await;
        superuser
            .batch_execute(&format!(r#"CREATE ROLE "back-up" LOGIN PASSWORD '{PASSWORD}'"#))
            .await
            .unwrap();
        let target = server.target("back-up", PASSWORD);

        // Follow the advice until everything works: each statement must cure what it is named for.
        let error = Session::connect(&target).await.unwrap().facts().await.unwrap_err();
        let PostgresError::MissingRight { grant, database, .. } = &error else { panic!("{error:?}") };
        assert_eq!(grant, r#"GRANT pg_read_all_settings TO "back-up";"#);
        assert_eq!(database, "postgres");
        superuser.batch_execute(grant).await.unwrap();
        let session = Session::connect(&target).await.unwrap();
        session.facts().await.unwrap();

        let error = session.start_backup("x", BackupLimits::default()).await.unwrap_err();
        let PostgresError::MissingRight { grant, .. } = &error else { panic!("{error:?}") };
        assert!(error.to_string().contains(grant.as_str()), "{error}");
        superuser.batch_execute(grant).await.unwrap();
        let session = Session::connect(&target).await.unwrap();
        session.start_backup("x", BackupLimits::default()).await.unwrap().stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_are_told_from_an_absent_server() {
    crypto();
    let server = Server::start("", &[]);
    for (role, password) in [("postgres", "wrong"), ("nobody", PASSWORD)] {
        let error = Session::connect(&server.target(role, password)).await.unwrap_err();
        assert!(matches!(&error, PostgresError::WrongCredentials { user, .. } if user == role), "{error:?}");
        assert!(
            !error.to_string().contains(PASSWORD) && !format!("{error:?}").contains("wrong\""),
            "{error:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_offers_tls_is_spoken_to_in_tls_and_a_ca_is_held_to() {
    crypto();
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().self_signed(&key).unwrap();
    let files = [("server.crt", certificate.pem()), ("server.key", key.serialize_pem())];
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let server = Server::start("ssl = on", &files);
    let superuser = server.superuser().await;
    let encrypted =
        "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'howdah'";

    let target = server.target("postgres", PASSWORD);
    let session = Session::connect(&target).await.unwrap();
    assert!(superuser.query_one(encrypted, &[]).await.unwrap().get::<_, bool>(0));
    drop(session);

    let mut trusting = target.clone();
    trusting.ca_pem = Some(certificate.pem());
    Session::connect(&trusting).await.unwrap();
    let other = rcgen::KeyPair::generate().unwrap();
    let stranger =
        rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().self_signed(&other).unwrap();
    trusting.ca_pem = Some(stranger.pem());
    let error = Session::connect(&trusting).await.unwrap_err();
    assert!(matches!(error, PostgresError::Unreachable { .. }), "{error:?}");

    let plain = Server::start("", &[]);
    let mut held = plain.target("postgres", PASSWORD);
    held.ca_pem = Some(certificate.pem());
    Session::connect(&held).await.unwrap_err();
}
