//! Where howdah's Ceph user, its key and the monitors' addresses stand in a cluster, and the connection made of them.

use std::str::FromStr;

use thiserror::Error;

use super::{Ceph, CephAccess, CephError, LocalRunner, Runner, ToolboxRunner, mon_host_from_rook};
use crate::kubernetes::{Kubernetes, KubernetesError};

/// Rook's ConfigMap with the addresses of the monitors, and its key.
const MON_ENDPOINTS: (&str, &str) = ("rook-ceph-mon-endpoints", "data");
/// Rook names the Secret of a CephClient this, and then the client.
const CLIENT_SECRET_PREFIX: &str = "rook-ceph-client-";

/// Where the rbd command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CephRunner {
    /// Here.
    Local,
    /// In the pod of Rook's toolbox.
    Toolbox,
}

impl FromStr for CephRunner {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "local" => Ok(Self::Local),
            "toolbox" => Ok(Self::Toolbox),
            _ => Err("write local or toolbox".to_owned()),
        }
    }
}

/// Who talks to which Ceph, and from where.
#[derive(Debug, Clone, Copy)]
pub struct CephPlace<'a> {
    /// Where the commands run.
    pub runner: CephRunner,
    /// Namespace of the Secret with the key, of the monitors' addresses, and of the toolbox.
    pub namespace: &'a str,
    /// The Ceph user, without `client.`.
    pub user: &'a str,
}

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// Key or addresses cannot be read from the cluster.
    #[error(transparent)]
    SetUp(#[from] KubernetesError),
    /// Ceph itself.
    #[error(transparent)]
    Ceph(#[from] CephError),
}

impl CephPlace<'_> {
    /// Reads key and addresses, and connects.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(&self, kubernetes: &Kubernetes) -> Result<Ceph, ConnectError> {
        let Self { runner, namespace, user } = self;
        let secret = format!("{CLIENT_SECRET_PREFIX}{user}");
        let key = kubernetes.secret_value(namespace, &secret, user).await?;
        let access = CephAccess::new(user, &key)?;
        let runner = match runner {
            CephRunner::Local => {
                let (map, key) = MON_ENDPOINTS;
                let data = kubernetes.config_value(namespace, map, key).await?;
                Runner::Local(LocalRunner::new(access, &mon_host_from_rook(&data)?)?)
            }
            CephRunner::Toolbox => {
                Runner::Toolbox(Box::new(ToolboxRunner::new(access, kubernetes.clone(), namespace)))
            }
        };
        Ok(Ceph::connect(runner).await?)
    }
}
