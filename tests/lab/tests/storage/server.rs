//! A PostgreSQL server of a test's own, on loopback.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use howdah_adapters::kubernetes::Credentials;
use howdah_adapters::postgres::Target;
use howdah_lab::postgres::{self, Binaries, DEBIAN_MAJOR};
use howdah_lab::process::wait_until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

pub use howdah_lab::postgres::PASSWORD;

/// A server starts in a second; what else is tested beside it may make that many.
const START_LIMIT: Duration = Duration::from_secs(60);
/// A fast shutdown of an idle server.
const STOP_LIMIT: Duration = Duration::from_secs(30);

pub struct Server {
    folder: TempDir,
    child: Child,
    port: u16,
}

impl Server {
    /// Makes and starts a server of Debian's version that asks every role for its password. `settings` are lines of
    /// postgresql.conf; `files` are put into the data directory, readable by the server alone.
    pub fn start(settings: &str, files: &[(&str, &str)]) -> Self {
        Self::start_version(DEBIAN_MAJOR, settings, files)
    }

    /// The same of any major version.
    pub fn start_version(major: u32, settings: &str, files: &[(&str, &str)]) -> Self {
        let folder = tempfile::Builder::new().prefix("howdah-postgres-").tempdir().unwrap();
        let binaries = Binaries::find(major, folder.path()).unwrap();
        let data = folder.path().join("data");
        binaries.initdb(&data).unwrap();
        for (name, content) in files {
            let path = data.join(name);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            binaries.give(&path).unwrap();
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let ours = format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = ''\n{settings}"
        );
        postgres::append(&data, "postgresql.conf", &ours).unwrap();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let mut server = binaries.server(&data);
        server.env("LC_ALL", "C.UTF-8").current_dir(folder.path());
        let child = server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let server = Self { folder, child, port };
        let ready = || server.log().contains("ready to accept connections");
        assert!(wait_until(START_LIMIT, ready), "{}", server.log());
        server
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub fn data_directory(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub fn target(&self, role: &str, password: &str) -> Target {
        Target {
            host: "127.0.0.1".to_owned(),
            port: self.port,
            database: "postgres".to_owned(),
            credentials: Credentials { username: role.to_owned(), password: password.to_owned() },
            ca_pem: None,
        }
    }

    /// A plain superuser's connection, for what the test itself wants to know or do.
    pub async fn superuser(&self) -> tokio_postgres::Client {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port).user("postgres").password(PASSWORD).dbname("postgres");
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// Ends it at once, as a crash does, and waits until it is gone.
    pub fn crash(&mut self) {
        self.signal(Signal::SIGQUIT);
        assert!(self.is_gone(), "PostgreSQL outlived a crash");
    }

    /// Whether it ends in time.
    fn is_gone(&mut self) -> bool {
        let child = &mut self.child;
        wait_until(STOP_LIMIT, || matches!(child.try_wait(), Ok(Some(_))))
    }

    fn signal(&mut self, signal: Signal) {
        // The number of one that has ended may be another process's by now.
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        let pid = Pid::from_raw(self.child.id().cast_signed());
        if let Err(error) = kill(pid, signal) {
            eprintln!("signal PostgreSQL: {error}");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGINT is a fast shutdown: sessions are ended, none is waited for.
        self.signal(Signal::SIGINT);
        if !self.is_gone() {
            // It may end at this moment; there is nobody to tell.
            let _ = self.child.kill();
        }
    }
}
