//! A PostgreSQL server of a test's own, on loopback.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use howdah_adapters::kubernetes::Credentials;
use howdah_adapters::postgres::Target;
use howdah_lab::process::wait_until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};
use tempfile::TempDir;

/// Debian's server; PostgreSQL refuses to run as root.
const BINARIES: &str = "/usr/lib/postgresql/15/bin";
const USER: &str = "postgres";
/// A server starts in a second; two emulated nodes beside it may make that many.
const START_LIMIT: Duration = Duration::from_secs(60);
/// A fast shutdown of an idle server.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// The password of every role.
pub const PASSWORD: &str = "correct horse";

pub struct Server {
    folder: TempDir,
    child: Child,
    port: u16,
}

impl Server {
    /// Makes and starts a server that asks every role for its password. `settings` are lines of postgresql.conf;
    /// `files` are put into the data directory, readable by the server alone.
    pub fn start(settings: &str, files: &[(&str, &str)]) -> Self {
        let Some(user) = User::from_name(USER).unwrap() else {
            panic!("there is no user {USER}: run make setup, which installs postgresql-15")
        };
        let (uid, gid) = (user.uid.as_raw(), user.gid.as_raw());
        let folder = tempfile::Builder::new().prefix("howdah-postgres-").tempdir().unwrap();
        chown(folder.path(), Some(uid), Some(gid)).unwrap();
        let as_postgres = |program: &str| {
            let mut command = Command::new(PathBuf::from(BINARIES).join(program));
            command.uid(uid).gid(gid).current_dir(folder.path()).env("LC_ALL", "C.UTF-8");
            command
        };
        let data = folder.path().join("data");
        let password = folder.path().join("password");
        fs::write(&password, PASSWORD).unwrap();
        let made = as_postgres("initdb")
            .args(["--auth=scram-sha-256", "--username=postgres", "--no-sync", "--pgdata"])
            .arg(&data)
            .arg(format!("--pwfile={}", password.display()))
            .output()
            .unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        for (name, content) in files {
            let path = data.join(name);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            chown(&path, Some(uid), Some(gid)).unwrap();
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let configuration = data.join("postgresql.conf");
        let text = fs::read_to_string(&configuration).unwrap();
        let ours = format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = ''\nfsync = on\n{settings}\n"
        );
        fs::write(&configuration, text + &ours).unwrap();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let child = as_postgres("postgres")
            .arg("-D")
            .arg(&data)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
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

    pub fn crash(&self) {
        self.signal(Signal::SIGQUIT);
    }

    fn signal(&self, signal: Signal) {
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
        let child = &mut self.child;
        if !wait_until(STOP_LIMIT, || matches!(child.try_wait(), Ok(Some(_)))) {
            let _ = child.kill();
        }
    }
}
