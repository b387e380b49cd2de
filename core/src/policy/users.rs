//! Who asks, and who must never be held up.

use super::Config;
use crate::names;

/// The user behind a request, as the API server has authenticated it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// `system:serviceaccount:NAMESPACE:NAME` for a pod, `system:node:NAME` for a kubelet, else what the cluster gives.
    pub name: String,
    /// The groups.
    pub groups: Vec<String>,
}

/// The group of the kubelets.
const NODES: &str = "system:nodes";
/// The controller manager where its controllers share one account, and the scheduler.
const CONTROL_PLANE: [&str; 2] = ["system:kube-controller-manager", "system:kube-scheduler"];
/// The controllers that delete pods and claims on behalf of what somebody else has decided: held up, they leave
/// namespaces in Terminating and pods on nodes that are gone.
const CONTROLLERS: [&str; 6] = [
    "generic-garbage-collector",
    "namespace-controller",
    "node-controller",
    "pod-garbage-collector",
    "statefulset-controller",
    "taint-eviction-controller",
];
/// Where these controllers have their service accounts.
const CONTROLLERS_PREFIX: &str = "system:serviceaccount:kube-system:";
/// Howdah's own programs that run operations.
const OPERATORS: [&str; 2] = ["howdah-scheduler", "howdah-failover"];

/// The names of everybody for whom [`User::is_control_plane`] holds.
pub(super) fn cleaners() -> impl Iterator<Item = String> {
    let controllers = CONTROLLERS.iter().map(|name| format!("{CONTROLLERS_PREFIX}{name}"));
    CONTROL_PLANE.iter().map(|name| (*name).to_owned()).chain(controllers)
}

impl User {
    /// Whether it is the kubelet of `node`.
    #[must_use]
    pub fn is_kubelet_of(&self, node: &str) -> bool {
        self.groups.iter().any(|group| group == NODES) && self.name.strip_prefix("system:node:") == Some(node)
    }

    /// Whether it is a part of the cluster that cleans up.
    #[must_use]
    pub fn is_control_plane(&self) -> bool {
        CONTROL_PLANE.contains(&self.name.as_str())
            || self.name.strip_prefix(CONTROLLERS_PREFIX).is_some_and(|name| CONTROLLERS.contains(&name))
    }

    /// Whether it is the part of howdah that runs backups, restores or failovers.
    #[must_use]
    pub fn runs_operations(&self, config: &Config) -> bool {
        let account = self.name.strip_prefix("system:serviceaccount:").and_then(|name| name.split_once(':'));
        account.is_some_and(|(namespace, name)| namespace == config.namespace && OPERATORS.contains(&name))
    }

    /// Whether it may do everything, in an emergency.
    #[must_use]
    pub fn breaks_the_glass(&self) -> bool {
        self.groups.iter().any(|group| group == names::BREAK_GLASS_GROUP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str, groups: &[&str]) -> User {
        User { name: name.to_owned(), groups: groups.iter().map(|group| (*group).to_owned()).collect() }
    }

    #[test]
    fn a_kubelet_speaks_for_its_own_node_alone() {
        let kubelet = user("system:node:a", &["system:nodes", "system:authenticated"]);
        assert!(kubelet.is_kubelet_of("a") && !kubelet.is_kubelet_of("b"));
        assert!(
            !user("system:node:a", &["system:authenticated"]).is_kubelet_of("a"),
            "a name alone proves nothing"
        );
    }

    #[test]
    fn only_the_cleaners_of_kube_system_are_the_control_plane() {
        assert!(user("system:serviceaccount:kube-system:namespace-controller", &[]).is_control_plane());
        assert!(user("system:kube-controller-manager", &[]).is_control_plane());
        for other in [
            "system:serviceaccount:kube-system:default",
            "system:serviceaccount:shop:namespace-controller",
            "namespace-controller",
            "kubernetes-admin",
        ] {
            assert!(!user(other, &[]).is_control_plane(), "{other}");
        }
    }

    #[test]
    fn the_webhook_is_not_even_asked_about_the_control_plane() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/base/webhook-configuration.yaml");
        let configuration = std::fs::read_to_string(path).unwrap();
        let excused = configuration.split("not-the-control-plane").skip(1).collect::<Vec<_>>();
        assert!(excused.len() > 3, "the entries for deletions excuse it");
        for condition in excused {
            let condition = condition.split("matchPolicy").next().unwrap();
            let listed = condition.matches("\'system:").count();
            assert_eq!(listed, CONTROL_PLANE.len() + CONTROLLERS.len(), "{condition}");
            let accounts = CONTROLLERS.iter().map(|name| format!("{CONTROLLERS_PREFIX}{name}"));
            for name in accounts.chain(CONTROL_PLANE.map(str::to_owned)) {
                assert!(condition.contains(&format!("'{name}'")), "{name} is missing in {condition}");
            }
        }
    }

    #[test]
    fn operations_are_run_by_howdah_in_its_own_namespace() {
        let config = Config { namespace: "guard".to_owned(), ..Config::default() };
        assert!(user("system:serviceaccount:guard:howdah-scheduler", &[]).runs_operations(&config));
        for other in [
            "system:serviceaccount:guard:howdah-webhook",
            "system:serviceaccount:howdah-system:howdah-scheduler",
        ] {
            assert!(!user(other, &[]).runs_operations(&config), "{other}");
        }
    }

    #[test]
    fn the_group_breaks_the_glass() {
        assert!(user("eve", &["howdah:break-glass"]).breaks_the_glass());
        assert!(!user("howdah:break-glass", &["system:masters"]).breaks_the_glass());
    }
}
