//! The lab's Ceph: one monitor, one manager and one bluestore OSD in a sparse file, all in the lab's network
//! namespace, with one pool for RBD.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::files;
use crate::lab::Lab;
use crate::netns::{self, BRIDGE_ADDRESS};
use crate::process::{
    self, Daemon, Network, ends_with_its_starter, output_of, output_within, write_atomically,
};
use crate::storage::users::ENTITIES;

/// The pool for RBD; Rook's examples call it so.
pub const POOL: &str = "replicapool";
/// The monitor's name.
pub const MONITOR: &str = "a";
/// The monitor's port for the second version of Ceph's protocol.
const MONITOR_PORT_V2: u16 = 3300;
/// The monitor's port for the first version, which the kernel's client and Rook's endpoint list use.
pub const MONITOR_PORT_V1: u16 = 6789;
/// Size of the OSD's sparse file: some databases of a few hundred MiB with clones and safety copies.
const OSD_BYTES: u64 = 12 << 30;
/// The least that bluestore accepts (its default is 4 GiB), because nodes need the memory.
const OSD_MEMORY_BYTES: u64 = 939_524_096;
/// One small OSD needs few placement groups; each costs start-up time.
const PLACEMENT_GROUPS: u32 = 8;
/// A monitor is up in a second, an OSD in some; this allows for two cores with twenty other things to do.
const START_LIMIT: Duration = Duration::from_secs(240);

/// Everybody whom Ceph knows from its first moment.
const INITIAL_KEYRING: &str = "initial.keyring";

/// An entity of Ceph's with what it may do.
struct Entity {
    name: &'static str,
    key: String,
    caps: &'static [(&'static str, &'static str)],
}

/// Where Ceph's administrator has his configuration.
pub fn config(lab: &Lab) -> PathBuf {
    lab.path("ceph/ceph.conf")
}

/// Brings up whatever of Ceph is not running.
pub fn up(lab: &Lab) -> Result<()> {
    prepare(lab)?;
    let settled = lab.path("ceph/settled");
    let runs = DAEMONS.iter().all(|daemon| process::running(lab, &daemon.process()).is_some());
    if runs && settled.is_file() {
        return Ok(());
    }
    let mut monitor = MONITOR_DAEMON.ensure(lab)?;
    let address = SocketAddrV4::new(BRIDGE_ADDRESS, MONITOR_PORT_V2);
    monitor.wait_ready(START_LIMIT, || {
        netns::within(lab, || TcpStream::connect_timeout(&address.into(), START_LIMIT).is_ok())
            .unwrap_or(false)
    })?;
    MANAGER_DAEMON.ensure(lab)?;
    let osd_uuid = read(lab, "osd.uuid")?;
    // Tells the monitor that there shall be an OSD 0; says so again without harm.
    client(lab, "ceph", &["osd", "new", &osd_uuid, "0"])?;
    let mut osd = OSD_DAEMON.ensure(lab)?;
    let groups = PLACEMENT_GROUPS.to_string();
    client(lab, "ceph", &["osd", "pool", "create", POOL, &groups, &groups])?;
    // Writes to the pool, so it returns when the OSD serves it.
    if let Err(error) = client(lab, "rbd", &["pool", "init", POOL]) {
        return Err(if osd.is_alive() {
            error
        } else {
            anyhow!("{error:#}; ceph-osd ended:\n{}", osd.log_tail())
        });
    }
    write_atomically(&settled, b"")
}

/// The Ceph cluster's id.
pub fn fsid(lab: &Lab) -> Result<String> {
    let configuration = read(lab, "ceph.conf")?;
    let fsid = configuration.lines().find_map(|line| line.strip_prefix("fsid = "));
    fsid.map(str::to_owned).context("find fsid in the lab's ceph.conf")
}

/// The key of one of those whom Ceph knows from its first moment, for instance `client.admin`.
pub fn key(lab: &Lab, entity: &str) -> Result<String> {
    let keyring = read(lab, INITIAL_KEYRING)?;
    key_of(&keyring, entity).with_context(|| format!("find {entity} in the lab's first keyring"))
}

fn key_of(keyring: &str, entity: &str) -> Option<String> {
    let header = format!("[{entity}]");
    let mut lines = keyring.lines().skip_while(|line| *line != header);
    lines.nth(1)?.trim().strip_prefix("key = ").map(str::to_owned)
}

/// Runs an administrator's command inside the lab. It waits by itself for the monitor and the OSD.
fn client(lab: &Lab, program: &str, args: &[&str]) -> Result<String> {
    let mut command = lab.command(program);
    netns::within(lab, || output_within(command.args(args), START_LIMIT))?
}

struct CephDaemon {
    program: &'static str,
    id: &'static str,
}

const MONITOR_DAEMON: CephDaemon = CephDaemon { program: "ceph-mon", id: MONITOR };
const MANAGER_DAEMON: CephDaemon = CephDaemon { program: "ceph-mgr", id: "x" };
const OSD_DAEMON: CephDaemon = CephDaemon { program: "ceph-osd", id: "0" };
const DAEMONS: [CephDaemon; 3] = [MONITOR_DAEMON, MANAGER_DAEMON, OSD_DAEMON];

impl CephDaemon {
    fn process(&self) -> String {
        format!("{}.{}", self.program, self.id)
    }

    fn command(&self, lab: &Lab) -> Command {
        let mut command = Command::new(self.program);
        // In the foreground: a daemon that forks away would lose its record.
        command.arg("--foreground").args(["--id", self.id, "--conf"]).arg(config(lab));
        command
    }

    fn ensure(&self, lab: &Lab) -> Result<Daemon> {
        process::ensure(lab, &self.process(), Network::Lab, || Ok(self.command(lab)))
    }
}

/// Writes configuration, keys and the two stores. What a killed run left half-made is made again; a store is
/// never made again once `prepared` says that it is whole.
fn prepare(lab: &Lab) -> Result<()> {
    let directory = lab.path("ceph");
    let done = directory.join("prepared");
    if done.is_file() {
        return Ok(());
    }
    files::remove_tree(&directory)?;
    for part in ["mon", "mgr", "osd", "run"] {
        let part = directory.join(part);
        fs::create_dir_all(&part).with_context(|| format!("create {}", part.display()))?;
    }
    let (fsid, osd_uuid) = (uuid()?, uuid()?);
    write_atomically(&config(lab), configuration(lab, &fsid).as_bytes())?;
    write_atomically(&directory.join("osd.uuid"), osd_uuid.as_bytes())?;
    write_keyrings(lab)?;
    thread::scope(|scope| {
        let osd = scope.spawn(|| make_osd_store(lab, &osd_uuid));
        make_monitor_store(lab, &fsid)?;
        osd.join().map_err(|_| anyhow!("make the OSD's store: its thread panicked"))?
    })?;
    write_atomically(&done, b"")
}

fn make_monitor_store(lab: &Lab, fsid: &str) -> Result<()> {
    let map = lab.path("ceph/monmap");
    let addresses = format!("[v2:{BRIDGE_ADDRESS}:{MONITOR_PORT_V2},v1:{BRIDGE_ADDRESS}:{MONITOR_PORT_V1}]");
    let mut monmaptool = lab.command("monmaptool");
    monmaptool.args(["--create", "--fsid", fsid, "--addv", MONITOR, &addresses]).arg(&map);
    output_of(&mut monmaptool)?;
    let mut make = MONITOR_DAEMON.command(lab);
    make.arg("--mkfs").arg("--monmap").arg(&map).arg("--keyring").arg(lab.path("ceph").join(INITIAL_KEYRING));
    output_of(&mut ends_with_its_starter(&make)).map(drop)
}

fn make_osd_store(lab: &Lab, uuid: &str) -> Result<()> {
    let mut make = OSD_DAEMON.command(lab);
    // Without --no-mon-config it tries for five minutes to reach the monitor.
    make.args(["--mkfs", "--no-mon-config", "--osd-uuid", uuid]);
    output_of(&mut ends_with_its_starter(&make)).map(drop)
}

fn write_keyrings(lab: &Lab) -> Result<()> {
    let entity = |name, caps| Ok::<_, anyhow::Error>(Entity { name, key: new_key(lab)?, caps });
    let everything: &[_] = &[("mon", "allow *"), ("mgr", "allow *"), ("osd", "allow *")];
    let monitor = entity("mon.", &[("mon", "allow *")])?;
    let admin = entity("client.admin", everything)?;
    let manager = entity("mgr.x", &[("mon", "allow profile mgr"), ("osd", "allow *"), ("mds", "allow *")])?;
    let osd =
        entity("osd.0", &[("mon", "allow profile osd"), ("mgr", "allow profile osd"), ("osd", "allow *")])?;
    let mut initial = vec![&monitor, &admin, &manager, &osd];
    let rook = ENTITIES.iter().map(|(name, caps)| entity(name, caps)).collect::<Result<Vec<_>>>()?;
    initial.extend(&rook);
    // The monitor takes all of them into its store when the store is made, so nobody has to be added later.
    for (file, entities) in [
        (INITIAL_KEYRING, &initial[..]),
        ("keyring", &[&admin]),
        ("mgr/keyring", &[&manager]),
        ("osd/keyring", &[&osd]),
    ] {
        let text: String = entities.iter().map(|entity| keyring_section(entity)).collect();
        write_atomically(&lab.path("ceph").join(file), text.as_bytes())?;
    }
    Ok(())
}

fn keyring_section(entity: &Entity) -> String {
    let mut text = format!("[{}]\n\tkey = {}\n", entity.name, entity.key);
    for (service, caps) in entity.caps {
        text.push_str(&format!("\tcaps {service} = \"{caps}\"\n"));
    }
    text
}

fn new_key(lab: &Lab) -> Result<String> {
    let key = output_of(lab.command("ceph-authtool").arg("--gen-print-key")).context("make a Ceph key")?;
    Ok(key.trim().to_owned())
}

fn uuid() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("make a UUID")?;
    Ok(uuid.trim().to_owned())
}

fn configuration(lab: &Lab, fsid: &str) -> String {
    let directory = lab.path("ceph");
    let directory = directory.display();
    let any = Ipv4Addr::UNSPECIFIED;
    format!(
        "[global]\n\
         fsid = {fsid}\n\
         mon_host = [v2:{BRIDGE_ADDRESS}:{MONITOR_PORT_V2},v1:{BRIDGE_ADDRESS}:{MONITOR_PORT_V1}]\n\
         public_network = {any}/0\n\
         keyring = {directory}/keyring\n\
         run_dir = {directory}/run\n\
         # As a hardened Rook cluster: clients must hold on to the identity the monitor gave them.\n\
         auth_allow_insecure_global_id_reclaim = false\n\
         mon_allow_pool_size_one = true\n\
         mon_allow_pool_delete = true\n\
         mon_warn_on_pool_no_redundancy = false\n\
         # The machine's disk is not Ceph's to judge.\n\
         mon_data_avail_warn = 2\n\
         mon_data_avail_crit = 1\n\
         osd_pool_default_size = 1\n\
         osd_pool_default_min_size = 1\n\
         osd_pool_default_pg_autoscale_mode = off\n\
         osd_crush_chooseleaf_type = 0\n\
         # A lease that runs out while a test stops the only OSD (after 16 s by default) may never be found renewed: only\n\
         # a second one's answer makes an OSD look. Its placement group then hangs for good, \"laggy\".\n\
         osd_pool_default_read_lease_ratio = 30\n\
         mgr_initial_modules =\n\
         bluestore_block_size = {OSD_BYTES}\n\
         osd_memory_target = {OSD_MEMORY_BYTES}\n\
         \n\
         [mon]\n\
         mon_data = {directory}/mon\n\
         # Made with the store.\n\
         keyring = {directory}/mon/keyring\n\
         mon_cluster_log_to_file = false\n\
         mon_cluster_log_to_stderr = false\n\
         admin_socket = {directory}/run/$name.asok\n\
         log_to_stderr = true\n\
         log_file =\n\
         \n\
         [mgr]\n\
         mgr_data = {directory}/mgr\n\
         keyring = {directory}/mgr/keyring\n\
         admin_socket = {directory}/run/$name.asok\n\
         log_to_stderr = true\n\
         log_file =\n\
         \n\
         [osd]\n\
         osd_data = {directory}/osd\n\
         keyring = {directory}/osd/keyring\n\
         admin_socket = {directory}/run/$name.asok\n\
         log_to_stderr = true\n\
         log_file =\n"
    )
}

fn read(lab: &Lab, file: &str) -> Result<String> {
    let path = lab.path("ceph").join(file);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_entity_finds_its_own_key() {
        let caps: &[_] = &[("mon", "allow *")];
        let entities =
            ["mon.", "client.admin"].map(|name| Entity { name, key: format!("key-of-{name}=="), caps });
        let keyring: String = entities.iter().map(keyring_section).collect();
        assert_eq!(key_of(&keyring, "mon.").unwrap(), "key-of-mon.==");
        assert_eq!(key_of(&keyring, "client.admin").unwrap(), "key-of-client.admin==");
        assert_eq!(key_of(&keyring, "client.a"), None);
    }
}
