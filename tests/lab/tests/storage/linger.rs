//! An API server that is slow to let a record leave a phase. Some phases last no longer than two requests, and a test that
//! looks for one on a busy machine comes too late.

use howdah_lab::stage::Stage;
use serde_json::json;

/// An address of the lab's bridge that nobody has. To find that out takes the kernel three seconds (three requests of ARP),
/// and as long does the API server wait for its webhook before it goes on without it.
const NOBODY: &str = "https://10.77.0.254/";

/// Records of one kind linger in the phases that are wished for.
pub struct Linger<'a> {
    stage: &'a Stage,
    resource: &'static str,
    /// A path to the phase in CEL.
    phase: &'static str,
}

impl<'a> Linger<'a> {
    pub fn of_restores(stage: &'a Stage) -> Self {
        Self { stage, resource: "postgresrestores/status", phase: ".?status.?phase" }
    }

    pub fn of_backups(stage: &'a Stage) -> Self {
        Self { stage, resource: "postgresbackups/status", phase: ".?status.?phase" }
    }

    pub fn of_drills(stage: &'a Stage) -> Self {
        Self { stage, resource: "postgresbackups/status", phase: ".?status.?verification.?phase" }
    }

    fn name(&self) -> String {
        format!("linger-{}", self.stage.namespace.name())
    }

    /// From now on in these and no others.
    pub fn only_in<'p>(&self, phases: impl IntoIterator<Item = &'p str>) {
        let phases: Vec<&str> = phases.into_iter().collect();
        let of = |object: &str| format!("{object}{}.orValue('')", self.phase);
        let (now, next) = (of("oldObject"), of("object"));
        let leaves = format!("{now} in {} && {now} != {next}", json!(phases));
        self.stage.apply(&json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": self.name()},
            "webhooks": [{
                "name": "linger.test.howdah.dev",
                "clientConfig": {"url": NOBODY},
                "rules": [{"operations": ["UPDATE"], "apiGroups": ["howdah.dev"], "apiVersions": ["*"],
                    "resources": [self.resource]}],
                "namespaceSelector": {"matchLabels":
                    {"kubernetes.io/metadata.name": self.stage.namespace.name()}},
                "matchConditions": [{"name": "leaves", "expression": leaves}],
                "failurePolicy": "Ignore",
                "timeoutSeconds": 10,
                "sideEffects": "None",
                "admissionReviewVersions": ["v1"]}]}));
    }
}

impl Drop for Linger<'_> {
    fn drop(&mut self) {
        let deleted = self.stage.lab.kubectl_ok(&["delete", "validatingwebhookconfiguration", &self.name()]);
        if let Err(error) = deleted {
            eprintln!("delete {}: {error:#}", self.name());
        }
    }
}
