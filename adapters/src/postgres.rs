//! PostgreSQL: one session that reads facts, and may become the one session that holds backup mode.
//!
//! Backup mode belongs to a session since PostgreSQL 15 (and in the form used here on 14, too): it ends when the
//! session ends. [`BackupSession`] owns its connection and cannot be cloned, [`BackupSession::stop`] consumes it, and
//! dropping it closes the connection, which makes the server abort backup mode. Should this process freeze, the server
//! ends the session by `idle_session_timeout`; should its node vanish in the middle of a call, by
//! `client_connection_check_interval` and `statement_timeout`.
//!
//! Connections use TLS if the server offers it. Without a CA certificate that is libpq's `sslmode=prefer`: safe from
//! listeners, not from somebody who can answer in the server's place. With a CA it is `verify-full`: the certificate
//! must be signed by it and name the host, and there is no fall-back to plain text.

mod tls;

use std::time::Duration;

use thiserror::Error;
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, Row};
use tracing::debug;

use crate::kubernetes::Credentials;

/// How long one attempt to reach the server may take, TCP, TLS and authentication together.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);

/// How long a query for facts may take; they read memory and a few catalogue rows.
const QUERY_LIMIT: Duration = Duration::from_secs(30);

/// How much longer than the server's own limit we wait, so that the server's reason arrives.
const ANSWER_MARGIN: Duration = Duration::from_secs(5);

/// The kernel gives a silent connection up after this.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

/// How soon a server that is busy with our call notices that we are gone.
const CONNECTION_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The oldest major version with community support, and the oldest whose sessions can be limited as above.
const VERSION_NUM_MIN: i32 = 140_000;

/// The first version with `pg_backup_start` in place of `pg_start_backup`.
const VERSION_NUM_BACKUP_START: i32 = 150_000;

/// A database server and how to log in. `Debug` shows no password.
#[derive(Clone, Debug)]
pub struct Target {
    /// Address or name.
    pub host: String,
    /// Usually 5432.
    pub port: u16,
    /// A database that exists; `postgres` does unless somebody dropped it.
    pub database: String,
    /// Role and password.
    pub credentials: Credentials,
    /// PEM certificates that must have signed the server's. None: encrypt if offered, and trust whoever answers.
    pub ca_pem: Option<String>,
}

/// How long the server lets backup mode last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupLimits {
    /// For the checkpoint at the start: it writes all dirty buffers.
    pub checkpoint: Duration,
    /// From the start's answer to the call of stop: the snapshot.
    pub snapshot: Duration,
}

impl Default for BackupLimits {
    /// Five minutes for the checkpoint; three for the snapshot, which takes a second or fails within 90.
    fn default() -> Self {
        Self { checkpoint: Duration::from_secs(300), snapshot: Duration::from_secs(180) }
    }
}

/// Why a conversation with PostgreSQL failed. The text begins with what was attempted.
#[derive(Debug, Error)]
pub enum PostgresError {
    /// Nobody answers, or the server takes no connections now.
    #[error("connect to PostgreSQL at {host}:{port}: {detail}")]
    Unreachable {
        /// The host asked.
        host: String,
        /// The port asked.
        port: u16,
        /// What happened.
        detail: String,
    },
    /// The server does not let this role in.
    #[error("log in to PostgreSQL as {user:?}: {detail}")]
    WrongCredentials {
        /// The role.
        user: String,
        /// The server's words.
        detail: String,
    },
    /// The role may not do it; `grant` cures that.
    #[error("{attempt}: {detail}; run as a superuser in the database {database:?}: {grant}")]
    MissingRight {
        /// What was attempted.
        attempt: String,
        /// The server's words.
        detail: String,
        /// Where the statement must be run: rights to functions are kept per database.
        database: String,
        /// The exact statement.
        grant: String,
    },
    /// A version that howdah does not know.
    #[error("use PostgreSQL {version}: 14 is the oldest supported version")]
    Unsupported {
        /// `server_version`.
        version: String,
    },
    /// No answer in time.
    #[error("{attempt}: no answer from PostgreSQL in {seconds} s")]
    TimedOut {
        /// What was attempted.
        attempt: String,
        /// The limit that passed.
        seconds: u64,
    },
    /// The session ended; backup mode ended with it.
    #[error("{attempt}: the session was lost: {detail}")]
    SessionLost {
        /// What was attempted.
        attempt: String,
        /// What is known of the reason.
        detail: String,
    },
    /// Anything else.
    #[error("{attempt}: {detail}")]
    Other {
        /// What was attempted.
        attempt: String,
        /// What happened.
        detail: String,
    },
}

/// What the server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFacts {
    /// `server_version`, e.g. `15.14 (Debian 15.14-0+deb12u1)`.
    pub version: String,
    /// `server_version_num`, e.g. 150014.
    pub version_num: i32,
    /// The identity of the database cluster; a 64-bit number, as text.
    pub system_identifier: String,
    /// The timeline of the latest checkpoint.
    pub timeline: u32,
    /// The data directory, as the server sees it.
    pub data_directory: String,
    /// Name and folder of each tablespace that lies outside the data directory.
    pub tablespaces: Vec<(String, String)>,
    /// Whether writes reach the disk.
    pub fsync: bool,
    /// Whether torn pages are repaired by recovery.
    pub full_page_writes: bool,
    /// Whether it is a standby or still recovers.
    pub in_recovery: bool,
    /// `archive_mode`: `off`, `on` or `always`.
    pub archive_mode: String,
    /// PostgreSQL 14 only: somebody's exclusive backup is on, whose label lies in the data directory.
    pub exclusive_backup: bool,
}

/// What ends a backup. Keep label and map byte for byte in the record; never write them into a clone unless an
/// archive covers `stop_lsn`, or PostgreSQL refuses to start on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupEnd {
    /// Where in the WAL the backup ended.
    pub stop_lsn: String,
    /// The content for `backup_label`.
    pub label: String,
    /// The content for `tablespace_map`; empty without tablespaces.
    pub tablespace_map: String,
}

/// What changes while snapshots of several volumes are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Where in the WAL the last checkpoint lies that has ended, as `pg_control` on the disk says. The server writes it there
    /// before it removes the WAL that only earlier recoveries needed (`CreateCheckPoint` in `xlog.c`).
    pub checkpoint: String,
    /// Up to where the WAL has reached the disk.
    pub flushed: String,
    /// Name and folder of each tablespace that lies outside the data directory.
    pub tablespaces: Vec<(String, String)>,
}

/// A session that reads.
#[derive(Debug)]
pub struct Session {
    connection: Connection,
    version_num: i32,
}

/// A client and the task that carries its bytes. The task ends with it, whatever the server does.
struct Connection {
    client: Client,
    task: JoinHandle<()>,
    user: String,
    database: String,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("user", &self.user)
            .field("database", &self.database)
            .finish_non_exhaustive()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Left to itself the task would wait for the answer to a call in flight before it closes the socket.
        self.task.abort();
    }
}

impl Session {
    /// Connects and limits what the session may do to the server.
    ///
    /// # Errors
    /// See [`PostgresError`].
    pub async fn connect(target: &Target) -> Result<Self, PostgresError> {
        let Target { host, port, database, credentials, ca_pem } = target;
        let mut config = Config::new();
        config
            .host(host.as_str())
            .port(*port)
            .dbname(database.as_str())
            .user(credentials.username.as_str())
            .password(credentials.password.as_str())
            .application_name("howdah")
            .connect_timeout(CONNECT_LIMIT)
            .tcp_user_timeout(TCP_USER_TIMEOUT)
            .ssl_mode(tls::mode(ca_pem.as_deref()));
        let connector = tls::connector(ca_pem.as_deref())?;
        let unreachable =
            |detail: String| PostgresError::Unreachable { host: host.clone(), port: *port, detail };
        let connecting = tokio::time::timeout(CONNECT_LIMIT, config.connect(connector)).await;
        let Ok(connected) = connecting else {
            return Err(unreachable(format!("no answer in {} s", CONNECT_LIMIT.as_secs())));
        };
        let (client, wire) = connected.map_err(|error| match error.code() {
            Some(code) if is_login_failure(code) => {
                PostgresError::WrongCredentials { user: credentials.username.clone(), detail: words(&error) }
            }
            _ => unreachable(words(&error)),
        })?;
        let task = tokio::spawn(async move {
            if let Err(error) = wire.await {
                debug!(error = %words(&error), "the connection to PostgreSQL ended");
            }
        });
        let (user, database) = (credentials.username.clone(), database.clone());
        let connection = Connection { client, task, user, database };

        let attempt = "read the server's version";
        let row = connection
            .row(
                "SELECT pg_catalog.current_setting('server_version'), \
                 pg_catalog.current_setting('server_version_num')::pg_catalog.int4",
                attempt,
                QUERY_LIMIT,
                None,
            )
            .await?;
        let (version, version_num): (String, i32) = (column(&row, 0, attempt)?, column(&row, 1, attempt)?);
        if version_num < VERSION_NUM_MIN {
            return Err(PostgresError::Unsupported { version });
        }
        // A role's own search_path could put other functions in front of the server's.
        let limits = format!(
            "SET search_path = pg_catalog; SET statement_timeout = {}; SET client_connection_check_interval = {}",
            QUERY_LIMIT.as_millis(),
            CONNECTION_CHECK_INTERVAL.as_millis()
        );
        connection.execute(&limits, "limit the session").await?;
        Ok(Self { connection, version_num })
    }

    /// Reads what a backup's preflight and record need.
    ///
    /// Whether `pg_wal` is a link to another volume cannot be asked in SQL.
    ///
    /// # Errors
    /// See [`PostgresError`]; reading `data_directory` needs the role `pg_read_all_settings`.
    pub async fn facts(&self) -> Result<ServerFacts, PostgresError> {
        let attempt = "read the server's settings";
        let connection = &self.connection;
        let exclusive_backup =
            if self.version_num < VERSION_NUM_BACKUP_START { "pg_is_in_backup()" } else { "false" };
        let query = format!(
            "SELECT current_setting('server_version'), (SELECT system_identifier::text FROM pg_control_system()), \
             (SELECT timeline_id FROM pg_control_checkpoint()), current_setting('data_directory'), \
             current_setting('fsync')::bool, current_setting('full_page_writes')::bool, pg_is_in_recovery(), \
             current_setting('archive_mode'), {exclusive_backup}"
        );
        let grant = format!("GRANT pg_read_all_settings TO {};", quoted(&connection.user));
        let row = connection.row(&query, attempt, QUERY_LIMIT, Some(grant)).await?;
        let timeline: i32 = column(&row, 2, attempt)?;
        Ok(ServerFacts {
            version: column(&row, 0, attempt)?,
            version_num: self.version_num,
            system_identifier: column(&row, 1, attempt)?,
            timeline: timeline.unsigned_abs(),
            data_directory: column(&row, 3, attempt)?,
            tablespaces: connection.tablespaces().await?,
            fsync: column(&row, 4, attempt)?,
            full_page_writes: column(&row, 5, attempt)?,
            in_recovery: column(&row, 6, attempt)?,
            archive_mode: column(&row, 7, attempt)?,
            exclusive_backup: column(&row, 8, attempt)?,
        })
    }

    /// Enters backup mode with an immediate checkpoint. The label shows in the record and in nothing else.
    ///
    /// # Errors
    /// See [`PostgresError`]. Whatever the error, the session is closed and no backup mode is left.
    pub async fn start_backup(
        self,
        label: &str,
        limits: BackupLimits,
    ) -> Result<BackupSession, PostgresError> {
        let attempt = "start backup mode";
        let Self { connection, version_num } = self;
        let (modern, user) = (version_num >= VERSION_NUM_BACKUP_START, quoted(&connection.user));
        let (query, functions) = if modern {
            (
                "SELECT pg_backup_start(label => $1, fast => true)::text",
                "pg_backup_start(text, boolean), pg_backup_stop(boolean)",
            )
        } else {
            // The third argument is `exclusive`: an exclusive backup would outlive the session.
            (
                "SELECT pg_start_backup($1, true, false)::text",
                "pg_start_backup(text, boolean, boolean), pg_stop_backup(boolean, boolean)",
            )
        };
        let grant = format!("GRANT EXECUTE ON FUNCTION {functions} TO {user};");
        let settings = format!(
            "SET statement_timeout = {}; SET idle_session_timeout = {}",
            limits.checkpoint.as_millis(),
            limits.snapshot.as_millis()
        );
        connection.execute(&settings, "limit backup mode").await?;
        let wait = limits.checkpoint + ANSWER_MARGIN;
        let call = tokio::time::timeout(wait, connection.client.query_one(query, &[&label])).await;
        let row = connection.judge(call, attempt, wait, Some(&grant))?;
        let start_lsn = column(&row, 0, attempt)?;
        Ok(BackupSession { connection, modern, start_lsn, grant })
    }
}

/// The session that is in backup mode. Dropping it ends backup mode.
#[derive(Debug)]
pub struct BackupSession {
    connection: Connection,
    modern: bool,
    start_lsn: String,
    grant: String,
}

impl BackupSession {
    /// Where in the WAL the backup begins.
    #[must_use]
    pub fn start_lsn(&self) -> &str {
        &self.start_lsn
    }

    /// Whether the connection is known to have ended. False says nothing: only [`BackupSession::stop`] proves that
    /// backup mode was held all the time.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.connection.client.is_closed()
    }

    /// Where the server stands.
    ///
    /// # Errors
    /// See [`PostgresError`].
    pub async fn standing(&self) -> Result<Standing, PostgresError> {
        let attempt = "read the last checkpoint";
        let query =
            "SELECT checkpoint_lsn::text, pg_current_wal_flush_lsn()::text FROM pg_control_checkpoint()";
        let functions = "pg_control_checkpoint(), pg_current_wal_flush_lsn()";
        let user = quoted(&self.connection.user);
        let grant = format!("GRANT EXECUTE ON FUNCTION {functions} TO {user};");
        let row = self.connection.row(query, attempt, QUERY_LIMIT, Some(grant)).await?;
        Ok(Standing {
            checkpoint: column(&row, 0, attempt)?,
            flushed: column(&row, 1, attempt)?,
            tablespaces: self.connection.tablespaces().await?,
        })
    }

    /// Leaves backup mode, without waiting for the archive: the snapshot needs no archived WAL, and an archiver that
    /// is stuck must not hold backup mode.
    ///
    /// # Errors
    /// [`PostgresError::SessionLost`] if backup mode had ended before; then a snapshot taken since is one of a running
    /// database, no more. Whatever the error, no backup mode is left.
    pub async fn stop(self) -> Result<BackupEnd, PostgresError> {
        let attempt = "stop backup mode";
        let query = if self.modern {
            "SELECT lsn::text, labelfile, spcmapfile FROM pg_backup_stop(wait_for_archive => false)"
        } else {
            "SELECT lsn::text, labelfile, spcmapfile FROM pg_stop_backup(false, false)"
        };
        let limit = format!("SET statement_timeout = {}", QUERY_LIMIT.as_millis());
        self.connection.execute(&limit, attempt).await?;
        let row = self.connection.row(query, attempt, QUERY_LIMIT, Some(self.grant.clone())).await?;
        Ok(BackupEnd {
            stop_lsn: column(&row, 0, attempt)?,
            label: column(&row, 1, attempt)?,
            tablespace_map: column::<Option<String>>(&row, 2, attempt)?.unwrap_or_default(),
        })
    }
}

impl Connection {
    async fn execute(&self, statements: &str, attempt: &str) -> Result<(), PostgresError> {
        let wait = QUERY_LIMIT + ANSWER_MARGIN;
        let call = tokio::time::timeout(wait, self.client.batch_execute(statements)).await;
        self.judge(call, attempt, wait, None)
    }

    async fn row(
        &self,
        query: &str,
        attempt: &str,
        limit: Duration,
        grant: Option<String>,
    ) -> Result<Row, PostgresError> {
        let wait = limit + ANSWER_MARGIN;
        let call = tokio::time::timeout(wait, self.client.query_one(query, &[])).await;
        self.judge(call, attempt, wait, grant.as_deref())
    }

    async fn rows(
        &self,
        query: &str,
        attempt: &str,
        limit: Duration,
        grant: Option<String>,
    ) -> Result<Vec<Row>, PostgresError> {
        let wait = limit + ANSWER_MARGIN;
        let call = tokio::time::timeout(wait, self.client.query(query, &[])).await;
        self.judge(call, attempt, wait, grant.as_deref())
    }

    async fn tablespaces(&self) -> Result<Vec<(String, String)>, PostgresError> {
        let attempt = "list the tablespaces";
        let query = "SELECT spcname::text, pg_tablespace_location(oid) FROM pg_tablespace \
                     WHERE pg_tablespace_location(oid) <> '' ORDER BY 1";
        let rows = self.rows(query, attempt, QUERY_LIMIT, None).await?;
        rows.iter().map(|row| Ok((column(row, 0, attempt)?, column(row, 1, attempt)?))).collect()
    }

    /// Sorts the outcome of a call by what a caller would do about it.
    fn judge<T>(
        &self,
        call: Result<Result<T, tokio_postgres::Error>, tokio::time::error::Elapsed>,
        attempt: &str,
        waited: Duration,
        grant: Option<&str>,
    ) -> Result<T, PostgresError> {
        let attempt = attempt.to_owned();
        let error = match call {
            Ok(Ok(answer)) => return Ok(answer),
            Err(_) => return Err(PostgresError::TimedOut { attempt, seconds: waited.as_secs() }),
            Ok(Err(error)) => error,
        };
        let detail = words(&error);
        Err(match (error.code(), grant) {
            (Some(&SqlState::INSUFFICIENT_PRIVILEGE), Some(grant)) => PostgresError::MissingRight {
                attempt,
                detail,
                database: self.database.clone(),
                grant: grant.to_owned(),
            },
            (Some(&SqlState::QUERY_CANCELED), _) => {
                PostgresError::TimedOut { attempt, seconds: waited.saturating_sub(ANSWER_MARGIN).as_secs() }
            }
            // Class 57P: the server ends the session (shutdown, crash, idle_session_timeout).
            (Some(code), _) if code.code().starts_with("57P") => {
                PostgresError::SessionLost { attempt, detail }
            }
            (None, _) if error.is_closed() || self.client.is_closed() => {
                PostgresError::SessionLost { attempt, detail }
            }
            _ => PostgresError::Other { attempt, detail },
        })
    }
}

fn is_login_failure(code: &SqlState) -> bool {
    *code == SqlState::INVALID_PASSWORD || *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION
}

/// The server's words where there are any: the driver's own `Display` says only `db error`.
fn words(error: &tokio_postgres::Error) -> String {
    if let Some(database) = error.as_db_error() {
        return match database.hint() {
            Some(hint) => format!("{} ({hint})", database.message()),
            None => database.message().to_owned(),
        };
    }
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

fn column<'a, T: tokio_postgres::types::FromSql<'a>>(
    row: &'a Row,
    index: usize,
    attempt: &str,
) -> Result<T, PostgresError> {
    row.try_get(index).map_err(|cause| PostgresError::Other {
        attempt: attempt.to_owned(),
        detail: format!("understand column {}: {}", index + 1, words(&cause)),
    })
}

/// A role's name as SQL takes it.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_quoted() {
        assert_eq!(quoted(r#"back"up"#), r#""back""up""#);
    }

    #[tokio::test]
    async fn a_closed_port_is_unreachable_and_says_where() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let credentials = Credentials { username: "howdah".to_owned(), password: "x".to_owned() };
        let target = Target {
            host: "127.0.0.1".to_owned(),
            port: 1,
            database: "postgres".to_owned(),
            credentials,
            ca_pem: None,
        };
        let error = Session::connect(&target).await.unwrap_err();
        assert!(matches!(error, PostgresError::Unreachable { .. }), "{error:?}");
        assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    }

    #[test]
    fn a_ca_that_is_none_is_refused() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        assert!(tls::connector(Some("not a certificate")).is_err());
        assert!(tls::connector(None).is_ok());
    }
}
