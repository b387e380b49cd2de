//! What each of howdah's service accounts can do, asked of the real API server and held against the
//! committed table docs/reference/rbac.md. `HOWDAH_GENERATE=1 cargo test -p howdah-lab --test api rbac`
//! writes the table anew, to be read in the diff.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectRulesReview, SelfSubjectRulesReviewSpec, SubjectAccessReview,
    SubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};

use howdah_lab::lab::Lab;
use howdah_lab::process::wait_until;
use howdah_lab::repository;
use howdah_lab::testing::shared_name;

use crate::deploy::{TURN, apply_rights, committed_equals};

const TABLE: &str = "docs/reference/rbac.md";
const ACCOUNTS: [&str; 2] = ["howdah-scheduler", "howdah-webhook"];
/// The verbs that the API server asks of its authorizer for resources.
const VERBS: [&str; 8] = ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"];
/// Verbs with a meaning of their own, each a way to more rights than one has.
const ESCALATIONS: [(&str, &str, &str); 6] = [
    ("rbac.authorization.k8s.io", "clusterroles", "bind"),
    ("rbac.authorization.k8s.io", "clusterroles", "escalate"),
    ("rbac.authorization.k8s.io", "roles", "bind"),
    ("", "users", "impersonate"),
    ("", "serviceaccounts", "impersonate"),
    ("certificates.k8s.io", "signers", "approve"),
];
/// Questions on their way at the same time: enough to keep two cores busy, few enough for the API server.
const CONCURRENCY: usize = 16;
/// The API server reads its policies anew every second or so.
const POLICY_LIMIT: std::time::Duration = std::time::Duration::from_secs(60);
/// No object has this name, so a right to it is a right to any name.
const ANY_NAME: &str = "a-name-nobody-has";

/// Never granted, whatever the committed table says: (API group, resource, verb).
const NEVER: [(&str, &str, &str); 12] = [
    ("", "secrets", "list"),
    ("", "secrets", "watch"),
    ("", "secrets", "create"),
    ("", "pods", "create"),
    ("", "pods", "delete"),
    ("", "pods", "deletecollection"),
    ("", "pods/eviction", "create"),
    ("", "pods/exec", "create"),
    ("", "pods/exec", "get"),
    ("", "serviceaccounts/token", "create"),
    ("", "persistentvolumeclaims", "delete"),
    ("apps", "statefulsets", "update"),
];

/// What the scheduler may do in the namespace of the restore drills, and nowhere else.
const OF_DRILLS: [(&str, &str); 3] =
    [("pods", "create"), ("pods", "delete"), ("persistentvolumeclaims", "delete")];

/// One right: where, what, of which name ("" is any) and which verb.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    group: String,
    resource: String,
    name: String,
    verb: String,
}

/// The namespaces that stand for all: howdah's own, Rook's, the control plane's, and two of users'.
struct Places {
    ordinary: String,
    granting: String,
}

impl Places {
    /// (name in the table, namespace in the cluster)
    fn all(&self) -> [(&'static str, &str); 6] {
        [
            ("any namespace", &self.ordinary),
            ("a namespace that binds howdah-credentials", &self.granting),
            ("howdah-system", "howdah-system"),
            ("howdah-verify", "howdah-verify"),
            ("rook-ceph", "rook-ceph"),
            ("kube-system", "kube-system"),
        ]
    }
}

#[tokio::test]
async fn service_accounts_can_do_what_the_committed_table_says_and_nothing_else() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let client = lab.client().await.unwrap();
    let _turn = TURN.lock().await;
    apply_rights(&lab, "rook").unwrap();
    let (ordinary, granting) = (lab.namespace("ordinary").unwrap(), lab.namespace("granting").unwrap());
    grant_credentials(&lab, granting.name()).unwrap();
    let places = Places { ordinary: ordinary.name().into(), granting: granting.name().into() };

    let kinds = resource_kinds(&client).await.unwrap();
    let mut table = String::from(HEADER);
    for account in ACCOUNTS {
        let rights = rights_by_place(&lab, account, &places).await.unwrap();
        write_section(&mut table, account, &rights);
        for (label, namespace) in places.all() {
            sweep(&client, account, namespace, &kinds, &rights[label]).await.unwrap();
        }
        never_holds(&client, account, &places).await.unwrap();
    }
    committed_equals(TABLE, &table).unwrap();
}

#[tokio::test]
async fn toolbox_overlay_adds_exec_in_rooks_namespace_alone() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let client = lab.client().await.unwrap();
    let _turn = TURN.lock().await;
    apply_rights(&lab, "toolbox").unwrap();
    let mut found = Vec::new();
    for namespace in ["rook-ceph", "default", "howdah-system"] {
        for verb in ["get", "create"] {
            let asked = allowed(&client, "howdah-scheduler", namespace, "", "pods/exec", "", verb);
            found.push((namespace, asked.await.unwrap()));
        }
    }
    // The other tests see the rights of the Rook overlay.
    for kind in ["role", "rolebinding"] {
        lab.kubectl_ok(&["-n", "rook-ceph", "delete", kind, "howdah-scheduler-toolbox"]).unwrap();
    }
    let wanted = [("rook-ceph", true), ("rook-ceph", true), ("default", false), ("default", false)];
    assert_eq!(found[..4], wanted);
    assert_eq!(found[4..], [("howdah-system", false); 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scheduler_makes_and_deletes_the_volumes_of_its_drills_alone() {
    let lab = Lab::open_or_up_without_ceph(&shared_name()).unwrap();
    let _turn = TURN.lock().await;
    apply_rights(&lab, "rook").unwrap();
    let policy = repository::root().join("deploy/base/verify.yaml");
    lab.kubectl_ok(&["apply", "--server-side", "--force-conflicts", "-f", policy.to_str().unwrap()]).unwrap();
    let volume = |name: &str, claim: &str| {
        serde_json::json!({"apiVersion": "v1", "kind": "PersistentVolume",
            "metadata": {"name": name, "labels": {"howdah.dev/drill": "u"}},
            "spec": {"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "storageClassName": "",
                "persistentVolumeReclaimPolicy": "Retain", "claimRef": {"namespace": claim, "name": name},
                "csi": {"driver": "nobody.example.com", "volumeHandle": name}}})
        .to_string()
    };
    let scheduler = "--as=system:serviceaccount:howdah-system:howdah-scheduler";
    let as_scheduler = |verb: &[&str], input: &str| {
        let output = lab.kubectl_with_input(&[&[scheduler], verb].concat(), input).unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let create = ["create", "-f", "-"];
    // A policy is obeyed some moments after it was made.
    let refused = wait_until(POLICY_LIMIT, || {
        let (passed, said) =
            as_scheduler(&["create", "--dry-run=server", "-f", "-"], &volume("other", "shop"));
        !passed && said.contains("restore drills alone")
    });
    assert!(refused, "the scheduler may make any volume");
    for (name, claim) in [("howdah-verify-u", "shop"), ("other", "howdah-verify")] {
        let (passed, said) = as_scheduler(&create, &volume(name, claim));
        assert!(!passed && said.contains("restore drills alone"), "{name} for {claim}: {said}");
    }
    let applied = lab.kubectl_apply(&volume("somebody-elses", "shop")).unwrap();
    assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
    let (passed, said) = as_scheduler(&["delete", "pv", "somebody-elses"], "");
    assert!(!passed && said.contains("restore drills alone"), "{said}");
    lab.kubectl_ok(&["delete", "pv", "somebody-elses"]).unwrap();
    let (passed, said) = as_scheduler(&create, &volume("howdah-verify-u", "howdah-verify"));
    assert!(passed, "{said}");
    let (passed, said) = as_scheduler(&["delete", "pv", "howdah-verify-u"], "");
    assert!(passed, "{said}");
}

/// What `kubectl howdah protect` or the owner of a namespace does.
fn grant_credentials(lab: &Lab, namespace: &str) -> Result<()> {
    let role = "--clusterrole=howdah-credentials";
    let account = "--serviceaccount=howdah-system:howdah-scheduler";
    lab.kubectl_ok(&["-n", namespace, "create", "rolebinding", "howdah-credentials", role, account]).map(drop)
}

const HEADER: &str = "\
<!-- Generated from a real API server by tests/lab/tests/api/rbac.rs. Do not edit. -->
# What howdah's service accounts can do

Asked of a Kubernetes API server on which `deploy/overlays/rook` was applied. Every other verb on every other
resource was asked too, and refused. Rights that every service account has (to ask about itself) are left out.
No account may read a Secret outside this table, run a command in a pod, or delete or evict a pod outside howdah-verify.
The scheduler may patch StatefulSets: a restore annotates and scales them. Of PersistentVolumes it makes and deletes those
of its restore drills alone: the policy howdah-scheduler-volumes (deploy/base/verify.yaml) refuses the rest.
";

fn user(account: &str) -> (String, Vec<String>) {
    let groups = ["system:serviceaccounts", "system:serviceaccounts:howdah-system", "system:authenticated"];
    (format!("system:serviceaccount:howdah-system:{account}"), groups.map(String::from).to_vec())
}

/// The rights that the API server lists for `account`, in each place, without those everybody has.
async fn rights_by_place(
    lab: &Lab,
    account: &str,
    places: &Places,
) -> Result<BTreeMap<&'static str, BTreeSet<Right>>> {
    let nobody = rights(lab, "no-such-account", &places.ordinary).await?;
    let mut found = BTreeMap::new();
    for (label, namespace) in places.all() {
        let all = rights(lab, account, namespace).await?;
        found.insert(label, all.difference(&nobody).cloned().collect());
    }
    Ok(found)
}

async fn rights(lab: &Lab, account: &str, namespace: &str) -> Result<BTreeSet<Right>> {
    let file = Kubeconfig::read_from(lab.kubeconfig()).context("read the lab's kubeconfig")?;
    let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    let (name, groups) = user(account);
    config.auth_info.impersonate = Some(name);
    config.auth_info.impersonate_groups = Some(groups);
    let review = SelfSubjectRulesReview {
        spec: SelfSubjectRulesReviewSpec { namespace: Some(namespace.into()) },
        ..SelfSubjectRulesReview::default()
    };
    let api: Api<SelfSubjectRulesReview> = Api::all(Client::try_from(config)?);
    let answer = api.create(&PostParams::default(), &review).await.context("ask for an account's rules")?;
    let status = answer.status.context("find the rules in the API server's answer")?;
    let mut rights = BTreeSet::new();
    for rule in status.resource_rules {
        let any = vec![String::new()];
        for group in rule.api_groups.as_ref().unwrap_or(&any) {
            for resource in rule.resources.as_ref().unwrap_or(&any) {
                for name in rule.resource_names.as_ref().filter(|names| !names.is_empty()).unwrap_or(&any) {
                    for verb in &rule.verbs {
                        rights.insert(Right {
                            group: group.clone(),
                            resource: resource.clone(),
                            name: name.clone(),
                            verb: verb.clone(),
                        });
                    }
                }
            }
        }
    }
    Ok(rights)
}

fn write_section(table: &mut String, account: &str, by_place: &BTreeMap<&'static str, BTreeSet<Right>>) {
    let everywhere = &by_place["any namespace"];
    let _ = writeln!(table, "\n## {account}\n\n| where | resource | names | verbs |\n|---|---|---|---|");
    write_rows(table, "everywhere", everywhere);
    for (place, rights) in by_place {
        write_rows(table, place, &rights.difference(everywhere).cloned().collect());
    }
}

fn write_rows(table: &mut String, place: &str, rights: &BTreeSet<Right>) {
    let mut rows: BTreeMap<(String, String), BTreeSet<&str>> = BTreeMap::new();
    for Right { group, resource, name, verb } in rights {
        let what = if group.is_empty() { resource.clone() } else { format!("{resource}.{group}") };
        rows.entry((what, name.clone())).or_default().insert(verb);
    }
    for ((what, name), verbs) in rows {
        let verbs: Vec<&str> = VERBS
            .iter()
            .copied()
            .filter(|verb| verbs.contains(verb))
            .chain(verbs.iter().copied().filter(|verb| !VERBS.contains(verb)))
            .collect();
        let name = if name.is_empty() { "any".into() } else { format!("`{name}`") };
        let _ = writeln!(table, "| {place} | `{what}` | {name} | {} |", verbs.join(", "));
    }
}

/// Every kind of resource that the API server serves, sub-resources included, as (group, resource).
async fn resource_kinds(client: &Client) -> Result<BTreeSet<(String, String)>> {
    let mut kinds = BTreeSet::new();
    for version in client.list_core_api_versions().await?.versions {
        for resource in client.list_core_api_resources(&version).await?.resources {
            kinds.insert((String::new(), resource.name));
        }
    }
    for group in client.list_api_groups().await?.groups {
        for version in group.versions {
            for resource in client.list_api_group_resources(&version.group_version).await?.resources {
                kinds.insert((group.name.clone(), resource.name));
            }
        }
    }
    ensure!(kinds.len() > 100, "the API server listed only {} resources", kinds.len());
    Ok(kinds)
}

/// Asks for every verb on every resource in `namespace`, and expects exactly `rights`.
async fn sweep(
    client: &Client,
    account: &str,
    namespace: &str,
    kinds: &BTreeSet<(String, String)>,
    rights: &BTreeSet<Right>,
) -> Result<()> {
    let mut questions: BTreeSet<Right> = rights.clone();
    for (group, resource) in kinds {
        // Asking about oneself: granted to every account, and left out of the table.
        if ["authorization.k8s.io", "authentication.k8s.io"].contains(&group.as_str()) {
            continue;
        }
        for verb in VERBS {
            questions.insert(Right {
                group: group.clone(),
                resource: resource.clone(),
                name: ANY_NAME.into(),
                verb: verb.into(),
            });
        }
    }
    for (group, resource, verb) in ESCALATIONS {
        questions.insert(Right {
            group: group.into(),
            resource: resource.into(),
            name: String::new(),
            verb: verb.into(),
        });
    }
    let surprises: Vec<String> = stream::iter(questions)
        .map(|asked| async move {
            let Right { group, resource, name, verb } = &asked;
            let wanted = rights.contains(&asked)
                || (name == ANY_NAME && rights.contains(&Right { name: String::new(), ..asked.clone() }));
            let found = allowed(client, account, namespace, group, resource, name, verb).await?;
            anyhow::Ok((found != wanted).then(|| {
                format!("{account} in {namespace}: {verb} {resource}.{group} {name}: allowed={found}, the table says {wanted}")
            }))
        })
        .buffer_unordered(CONCURRENCY)
        .try_filter_map(|surprise| async move { Ok(surprise) })
        .try_collect()
        .await?;
    ensure!(surprises.is_empty(), "{}", surprises.join("\n"));
    Ok(())
}

/// Checks [`NEVER`] in users' namespaces, howdah's and Rook's, for every name that means anything.
async fn never_holds(client: &Client, account: &str, places: &Places) -> Result<()> {
    for (label, namespace) in places.all() {
        let drills = account == "howdah-scheduler" && namespace == "howdah-verify";
        for (group, resource, verb) in NEVER {
            if drills && OF_DRILLS.contains(&(resource, verb)) {
                continue;
            }
            let found = allowed(client, account, namespace, group, resource, ANY_NAME, verb).await?;
            ensure!(!found, "{account} can {verb} {resource} in {label}");
        }
        let reads_secrets = allowed(client, account, namespace, "", "secrets", ANY_NAME, "get").await?;
        let may = account == "howdah-scheduler" && namespace == places.granting;
        ensure!(reads_secrets == may, "{account} reads any Secret in {label}: {reads_secrets}, wanted {may}");
    }
    Ok(())
}

async fn allowed(
    client: &Client,
    account: &str,
    namespace: &str,
    group: &str,
    resource: &str,
    name: &str,
    verb: &str,
) -> Result<bool> {
    let (user, groups) = user(account);
    let (resource, subresource) = match resource.split_once('/') {
        Some((resource, subresource)) => (resource, Some(subresource.to_owned())),
        None => (resource, None),
    };
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(user),
            groups: Some(groups),
            resource_attributes: Some(ResourceAttributes {
                namespace: Some(namespace.into()),
                group: Some(group.into()),
                resource: Some(resource.into()),
                subresource,
                name: Some(name.into()),
                verb: Some(verb.into()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let api: Api<SubjectAccessReview> = Api::all(client.clone());
    let answer = api.create(&PostParams::default(), &review).await.context("ask whether an account may")?;
    Ok(answer.status.context("find the verdict in the API server's answer")?.allowed)
}
