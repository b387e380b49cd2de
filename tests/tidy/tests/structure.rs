//! The layout is the architecture (docs/ARCHITECTURE.md): these tests fail when an edge or a size breaks it.

#![expect(clippy::expect_used, reason = "a test says what is wrong by failing")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};
use howdah_core::policy::{Refusal, Rule};
use howdah_tidy::root;

fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        // One platform: crates of others are not fetched by a build here.
        .other_options(["--locked", "--filter-platform", "x86_64-unknown-linux-gnu"].map(String::from))
        .exec()
        .expect("read cargo metadata")
}

/// Edges between workspace members that a normal (not dev) build has.
fn member_edges(metadata: &Metadata) -> BTreeMap<String, BTreeSet<String>> {
    let members: BTreeSet<String> =
        metadata.workspace_packages().iter().map(|p| p.name.to_string()).collect();
    metadata
        .workspace_packages()
        .iter()
        .map(|package| {
            let edges = package
                .dependencies
                .iter()
                .filter(|d| d.kind != DependencyKind::Development && members.contains(&d.name))
                .map(|d| d.name.clone())
                .collect();
            (package.name.to_string(), edges)
        })
        .collect()
}

/// `NAME vVERSION FEATURES` of each package for these kinds of dependencies. `cargo tree` resolves features as a build does;
/// `cargo metadata` shows optional crates that nobody turns on.
fn tree(kinds: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--workspace",
            "--locked",
            "--prefix",
            "none",
            "--format",
            "{p} {f}",
            "--edges",
            kinds,
        ])
        .current_dir(root())
        .output()
        .expect("run cargo tree");
    assert!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8_lossy(&output.stdout);
    // What was printed before is marked.
    lines.lines().map(|line| line.trim_end_matches(" (*)").to_owned()).collect()
}

#[test]
fn tests_ask_for_no_other_features_of_what_programs_are_made_of() {
    let (programs, tests) = (tree("normal,build"), tree("normal,build,dev"));
    let twice: Vec<_> = programs.difference(&tests).collect();
    assert!(
        twice.is_empty(),
        "compiled twice, with all that needs them; give them these features in the workspace: {twice:?}"
    );
}

#[test]
fn dependencies_point_one_way() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("howdah-core", &[][..]),
        ("howdah-adapters", &["howdah-core"][..]),
        ("howdah-certs", &["howdah-core", "howdah-adapters"][..]),
        ("howdah-webhook", &["howdah-core", "howdah-adapters", "howdah-certs"][..]),
        ("howdah-scheduler", &["howdah-core", "howdah-adapters"][..]),
        ("howdah-cli", &["howdah-core", "howdah-adapters"][..]),
        ("howdah-lab", &["howdah-core", "howdah-adapters"][..]),
        ("howdah-fuzz", &["howdah-core", "howdah-webhook"][..]),
        ("howdah-bench-figures", &[][..]),
        ("howdah-bench-admission", &["howdah-bench-figures", "howdah-lab"][..]),
        (
            "howdah-bench-backup",
            &["howdah-core", "howdah-adapters", "howdah-bench-figures", "howdah-lab"][..],
        ),
        ("howdah-tidy", &[][..]),
    ]);
    for (package, edges) in member_edges(&metadata()) {
        let permitted = allowed.get(package.as_str()).unwrap_or_else(|| {
            panic!("package {package} is new: give it a place in docs/ARCHITECTURE.md and here")
        });
        for edge in edges {
            assert!(permitted.contains(&edge.as_str()), "{package} must not depend on {edge}");
        }
    }
}

#[test]
fn core_does_no_io() {
    let metadata = metadata();
    let resolve = metadata.resolve.as_ref().expect("metadata has a resolve graph");
    let by_id: BTreeMap<&PackageId, &str> =
        metadata.packages.iter().map(|p| (&p.id, p.name.as_str())).collect();
    let nodes: BTreeMap<&PackageId, _> = resolve.nodes.iter().map(|n| (&n.id, n)).collect();
    let core = metadata.packages.iter().find(|p| p.name.as_str() == "howdah-core").expect("core exists");
    let mut seen = BTreeSet::new();
    let mut open = vec![&core.id];
    while let Some(id) = open.pop() {
        if !seen.insert(id) {
            continue;
        }
        for dependency in &nodes[id].deps {
            if dependency.dep_kinds.iter().any(|k| k.kind == DependencyKind::Normal) {
                open.push(&dependency.pkg);
            }
        }
    }
    let names: BTreeSet<&str> = seen.iter().map(|id| by_id[id]).collect();
    for forbidden in [
        "tokio",
        "kube",
        "kube-client",
        "k8s-openapi",
        "axum",
        "hyper",
        "rustls",
        "tokio-postgres",
        "reqwest",
    ] {
        assert!(!names.contains(forbidden), "howdah-core reaches {forbidden}; it must stay free of IO");
    }
}

#[test]
fn core_never_asks_the_clock_or_the_system() {
    for file in rust_files(&root().join("core/src")) {
        let text = fs::read_to_string(&file).expect("read source");
        // Tests read fixtures; what stands before them is the code.
        let text = text.split("#[cfg(test)]").next().unwrap_or_default();
        for forbidden in [
            "Timestamp::now(",
            "Zoned::now(",
            "SystemTime::now(",
            "Instant::now(",
            "std::fs",
            "std::net",
            "std::env",
            "std::process",
        ] {
            assert!(
                !text.contains(forbidden),
                "{} uses {forbidden}: `now` and IO are parameters in core",
                file.display()
            );
        }
    }
}

#[test]
fn one_crypto_provider_in_the_graph() {
    let tree = tree("normal,build,dev");
    assert!(!tree.iter().any(|l| l.starts_with("ring v")), "ring is in the graph beside aws-lc-rs");
    assert!(tree.iter().any(|l| l.starts_with("aws-lc-rs v")), "aws-lc-rs is the provider");
}

#[test]
fn mains_are_short() {
    const MOST_LINES: usize = 60;
    for package in metadata().workspace_packages() {
        for target in package.targets.iter().filter(|t| t.is_bin()) {
            let text = fs::read_to_string(&target.src_path).expect("read main");
            let lines = text.lines().count();
            assert!(
                lines < MOST_LINES,
                "{} has {lines} lines; a main wires and nothing else",
                target.src_path
            );
            let has_library = package.targets.iter().any(cargo_metadata::Target::is_lib);
            assert!(
                !has_library || !text.contains("#[test]"),
                "{} has a test: `make test` looks for them in the library",
                target.src_path
            );
        }
    }
}

#[test]
fn every_rule_file_stands_in_the_table_and_has_fixtures() {
    let folder = root().join("core/src/policy");
    let rules = &howdah_core::policy::RULES;
    let table: BTreeSet<&str> = rules.iter().map(|rule| rule.id).collect();
    let mut files = BTreeSet::new();
    for file in rust_files(&folder) {
        let text = fs::read_to_string(&file).expect("read source");
        if text.contains("const RULE: Rule") {
            let stem = file.file_stem().and_then(|s| s.to_str()).expect("a file name").replace('_', "-");
            files.insert(stem);
        }
    }
    assert_eq!(
        files.iter().map(String::as_str).collect::<BTreeSet<_>>(),
        table,
        "rule files and RULES must name the same rules"
    );
    for Rule { id, refusal, .. } in rules {
        let fixtures = root().join("core/fixtures").join(id);
        let names: Vec<String> = fs::read_dir(&fixtures)
            .unwrap_or_else(|error| panic!("rule {id} has no fixture folder {}: {error}", fixtures.display()))
            .map(|entry| entry.expect("read entry").file_name().to_string_lossy().into_owned())
            .collect();
        // A rule that only advises denies nothing.
        let kinds = if *refusal == Refusal::Advice { &["allow-"][..] } else { &["allow-", "deny-"] };
        for kind in kinds {
            assert!(names.iter().any(|n| n.starts_with(kind)), "rule {id} has no {kind}*.yaml fixture");
        }
    }
}

#[test]
fn every_version_stands_in_the_workspace_table() {
    for package in metadata().workspace_packages() {
        let text = fs::read_to_string(&package.manifest_path).expect("read manifest");
        for line in text.lines().skip_while(|l| !l.contains("dependencies]")) {
            let names_version = line.contains(" = \"") || line.contains("version =");
            assert!(
                !names_version || line.starts_with('['),
                "{}: `{line}` names a version; put it in [workspace.dependencies]",
                package.manifest_path
            );
        }
        assert!(
            text.contains("[lints]\nworkspace = true"),
            "{} does not take the workspace's lints",
            package.manifest_path
        );
    }
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).unwrap_or_else(|e| panic!("list {}: {e}", next.display())) {
            let path = entry.expect("read entry").path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}
