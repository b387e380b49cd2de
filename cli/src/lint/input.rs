//! Files, folders and standard input, read into manifests within limits. What cannot be read is reported with its file,
//! document and field, and the rest is read on.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use howdah_core::lint::{self, Manifest, Sort};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::autoscaling::{v1, v2};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use serde::Deserialize as _;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::lines::{self, Node};

/// Longest file: the dump of a large cluster. Longer ones would be read into memory several times over.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Most files of one call; a folder with more is not one of manifests.
const FILES_MAX: usize = 10_000;
/// Deepest folder below the one that is named: a loop of mounts ends here.
const FOLDERS_DEEP_MAX: usize = 32;
/// Most documents of one file.
const DOCUMENTS_MAX: usize = 10_000;
/// How standard input is called, on the command line and in reports.
const STDIN: &str = "-";

/// Everything that was read.
#[derive(Debug, Default)]
pub struct Input {
    /// How many files.
    pub files: usize,
    /// Their documents.
    pub documents: Vec<Document>,
    /// What could not be read.
    pub troubles: Vec<Trouble>,
}

/// One document of a file.
#[derive(Debug)]
pub struct Document {
    /// The file, as it was named.
    pub file: String,
    /// The number of the document in it, counted from 1.
    pub number: usize,
    /// Its objects.
    pub manifests: Vec<Manifest>,
    lines: Option<Node>,
}

impl Document {
    /// The line of a field of the object at `path`, if lines are known at all.
    pub fn line_of(&self, path: &str, field: &str) -> Option<usize> {
        self.lines.as_ref().map(|lines| lines.line_of(&lint::join(path, field)))
    }
}

/// Something that could not be read.
#[derive(Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The file, as it was named.
    pub file: String,
    /// The number of the document, where it came to that.
    pub document: Option<usize>,
    /// The line, where it is known.
    pub line: Option<usize>,
    /// The field, where it came to that; empty otherwise.
    pub field: String,
    /// What is wrong, and the cure.
    pub problem: String,
}

impl Trouble {
    fn of_file(file: &str, problem: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            document: None,
            line: None,
            field: String::new(),
            problem: problem.into(),
        }
    }
}

impl Input {
    /// Reads everything that is named.
    pub fn read(paths: &[PathBuf]) -> Self {
        let mut input = Self::default();
        for path in paths {
            if path.as_os_str() == STDIN {
                input.file(STDIN, std::io::stdin().lock());
            } else if path.is_dir() {
                input.folder(path, 0);
            } else {
                input.open(path);
            }
        }
        input
    }

    /// Reads the manifests of a folder and of those below it, in the order of their names. Hidden ones are left out, and
    /// links to folders are not followed.
    fn folder(&mut self, folder: &Path, depth: usize) {
        let name = folder.display().to_string();
        if depth > FOLDERS_DEEP_MAX {
            let problem =
                format!("it lies more than {FOLDERS_DEEP_MAX} folders deep: name it on the command line");
            return self.troubles.push(Trouble::of_file(&name, problem));
        }
        let entries = fs::read_dir(folder).and_then(|entries| entries.collect::<Result<Vec<_>, _>>());
        let mut entries = match entries {
            Ok(entries) => entries,
            Err(error) => return self.troubles.push(Trouble::of_file(&name, format!("list it: {error}"))),
        };
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let path = entry.path();
            let manifest =
                path.extension().is_some_and(|end| ["yaml", "yml", "json"].iter().any(|known| end == *known));
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.folder(&path, depth + 1);
            } else if manifest && path.is_file() {
                self.open(&path);
            }
        }
    }

    fn open(&mut self, path: &Path) {
        let name = path.display().to_string();
        match fs::File::open(path) {
            Ok(file) => self.file(&name, file),
            Err(error) => self.troubles.push(Trouble::of_file(&name, format!("open it: {error}"))),
        }
    }

    fn file(&mut self, name: &str, reader: impl Read) {
        if self.files == FILES_MAX {
            let problem =
                format!("it and what comes after it are left out: {FILES_MAX} files are read at most");
            if !self.troubles.iter().any(|trouble| trouble.problem == problem) {
                self.troubles.push(Trouble::of_file(name, problem));
            }
            return;
        }
        self.files += 1;
        let mut bytes = Vec::new();
        if let Err(error) = reader.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes) {
            return self.troubles.push(Trouble::of_file(name, format!("read it: {error}")));
        }
        if bytes.len() as u64 > FILE_BYTES_MAX {
            let problem = format!("it is longer than {FILE_BYTES_MAX} bytes: split it");
            return self.troubles.push(Trouble::of_file(name, problem));
        }
        match String::from_utf8(bytes) {
            Ok(text) => self.text(name, text.trim_start_matches('\u{feff}')),
            Err(_) => self.troubles.push(Trouble::of_file(name, "it is not UTF-8 text")),
        }
    }

    fn text(&mut self, file: &str, text: &str) {
        let (values, trouble) = values(file, text);
        let mut lines = lines::documents(text);
        // Fewer documents with lines than with values are fine: the lines end where the parsers disagree.
        lines.truncate(values.len());
        let mut lines = lines.into_iter();
        for (i, value) in values.into_iter().enumerate() {
            let lines = lines.next().filter(|lines| lines.agrees_with(&value));
            self.document(file, i + 1, value, lines);
        }
        self.troubles.extend(trouble);
    }

    fn document(&mut self, file: &str, number: usize, value: Value, lines: Option<Node>) {
        let mut document = Document { file: file.to_owned(), number, manifests: Vec::new(), lines };
        let manifests = match lint::manifests(value) {
            Ok(manifests) => manifests,
            Err(unreadable) => {
                let line = document.line_of("", &unreadable.field);
                return self.troubles.push(Trouble {
                    file: file.to_owned(),
                    document: Some(number),
                    line,
                    field: unreadable.field,
                    problem: unreadable.problem,
                });
            }
        };
        for manifest in manifests {
            match mistake(&manifest, document.lines.as_ref()) {
                None => document.manifests.push(manifest),
                Some((field, problem)) => {
                    let line = document.line_of("", &field);
                    self.troubles.push(Trouble {
                        file: file.to_owned(),
                        document: Some(number),
                        line,
                        field,
                        problem,
                    });
                }
            }
        }
        self.documents.push(document);
    }
}

/// The documents of a text, and what ended the reading before the end.
fn values(file: &str, text: &str) -> (Vec<Value>, Option<Trouble>) {
    // JSON is read as JSON where it is: YAML knows other escapes.
    if text.trim_start().starts_with('{') {
        let read: Result<Vec<Value>, _> = serde_json::Deserializer::from_str(text).into_iter().collect();
        if let Ok(values) = read {
            return (values, None);
        }
    }
    let mut values = Vec::new();
    if text.trim().is_empty() {
        return (values, None);
    }
    let hint = if text.contains("{{") {
        "; a template has to be rendered first, as in `helm template . | kubectl howdah lint -`"
    } else {
        ""
    };
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let number = values.len() + 1;
        let trouble = |line, problem: String| {
            let problem = format!("{problem}; nothing after it in this file was read");
            Some(Trouble { line, document: Some(number), ..Trouble::of_file(file, problem) })
        };
        if number > DOCUMENTS_MAX {
            return (
                values,
                trouble(None, format!("{DOCUMENTS_MAX} documents are read at most: split the file")),
            );
        }
        let value = serde_yaml_ng::Value::deserialize(document).and_then(|mut value| {
            value.apply_merge()?;
            Ok(value)
        });
        let value = match value {
            Ok(value) => value,
            Err(error) => {
                let line = error.location().map(|location| location.line());
                return (values, trouble(line, format!("it is no YAML: {error}{hint}")));
            }
        };
        match serde_json::to_value(value) {
            Ok(value) => values.push(value),
            Err(error) => {
                return (values, trouble(None, format!("it cannot be written as JSON: {error}{hint}")));
            }
        }
    }
    (values, None)
}

/// Why the API server would not read what is judged: a StatefulSet that is meant to be protected, an autoscaler, a
/// disruption budget. As field and problem.
fn mistake(manifest: &Manifest, lines: Option<&Node>) -> Option<(String, String)> {
    let Manifest { path, object } = manifest;
    match lint::sort(object) {
        Sort::Other => return None,
        Sort::Dependent(_) => {
            return match object["apiVersion"].as_str()? {
                "autoscaling/v1" => misread::<v1::HorizontalPodAutoscaler>(path, object, &[]),
                "autoscaling/v2" => misread::<v2::HorizontalPodAutoscaler>(path, object, &METRIC_QUANTITIES),
                "policy/v1" => misread::<PodDisruptionBudget>(path, object, &[]),
                // One that this version of the types does not know; the rules read the fields that all of them have.
                _ => None,
            };
        }
        Sort::Protected | Sort::Mislabelled => {}
    }
    if object["apiVersion"] != "apps/v1" {
        return Some((
            lint::join(path, "apiVersion"),
            format!("it is {}, wanted apps/v1", object["apiVersion"]),
        ));
    }
    if let Some((field, word)) = lines.and_then(|lines| lines.old_booleans(path).into_iter().next()) {
        let problem =
            format!("{word} without quotes is a boolean to Kubernetes, wanted a string: write \"{word}\"");
        return Some((field, problem));
    }
    misread::<StatefulSet>(path, object, &POD_QUANTITIES)
}

/// Why the object is none of this type, whose fields with these names are quantities.
fn misread<T: DeserializeOwned>(path: &str, object: &Value, quantities: &[&str]) -> Option<(String, String)> {
    let mut typed = object.clone();
    spell_out_quantities(&mut typed, quantities);
    let error = serde_path_to_error::deserialize::<_, T>(typed).err()?;
    let field = error.path().to_string();
    let field = if field == "." { path.to_owned() } else { lint::join(path, &field) };
    Some((field, format!("it cannot be read: {}", error.inner())))
}

/// Fields of a pod that hold one quantity,
const POD_QUANTITIES: [&str; 2] = ["sizeLimit", "divisor"];
/// and those of the metrics of an autoscaler.
const METRIC_QUANTITIES: [&str; 2] = ["averageValue", "value"];

/// Writes the quantities that stand as numbers as text: the API server takes both, the types only text.
fn spell_out_quantities(value: &mut Value, scalars: &[&str]) {
    const MAPS: [&str; 4] = ["limits", "requests", "overhead", "capacity"];
    fn spell_out(value: &mut Value) {
        if let Value::Number(number) = value {
            *value = Value::String(number.to_string());
        }
    }
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| spell_out_quantities(item, scalars)),
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::Object(quantities) if MAPS.contains(&key.as_str()) => {
                        quantities.values_mut().for_each(spell_out);
                    }
                    value if scalars.contains(&key.as_str()) => spell_out(value),
                    value => spell_out_quantities(value, scalars),
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Input {
        let mut input = Input::default();
        input.file("db.yaml", text.as_bytes());
        input
    }

    fn only_trouble(text: &str) -> Trouble {
        let mut input = read(text);
        assert_eq!(input.troubles.len(), 1, "{:?}", input.troubles);
        input.troubles.remove(0)
    }

    const SET: &str = "apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {name: db, labels: {howdah.dev/protect: \"true\"}}\n";

    #[test]
    fn what_belongs_to_a_set_is_read_as_the_api_server_reads_it() {
        let autoscaler = |spec: &str| {
            format!(
                "apiVersion: autoscaling/v2\nkind: HorizontalPodAutoscaler\nmetadata: {{name: db}}\nspec: {spec}\n"
            )
        };
        let target = "scaleTargetRef: {apiVersion: apps/v1, kind: StatefulSet, name: db}";
        let found = only_trouble(&autoscaler(&format!("{{{target}, maxReplicas: \"3\"}}")));
        assert_eq!(found.field, "spec.maxReplicas", "{found:?}");
        assert!(found.problem.contains("invalid type: string \"3\""), "{found:?}");
        let metric =
            "{type: Pods, pods: {metric: {name: x}, target: {type: AverageValue, averageValue: 100}}}";
        let fine = read(&autoscaler(&format!("{{{target}, maxReplicas: 1, metrics: [{metric}]}}")));
        assert!(fine.troubles.is_empty(), "{:?}", fine.troubles);

        let budget = "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: db}\nspec: ";
        let found = only_trouble(&format!("{budget}{{minAvailable: [1]}}\n"));
        assert_eq!(found.field, "spec.minAvailable", "{found:?}");
        assert!(read(&format!("{budget}{{minAvailable: 50%}}\n")).troubles.is_empty());
    }

    #[test]
    fn documents_are_counted_and_empty_ones_hold_nothing() {
        let input = read(&format!("# nothing yet\n---\n{SET}---\n---\nkey: value\n"));
        assert_eq!(input.troubles, []);
        let counts: Vec<(usize, usize)> =
            input.documents.iter().map(|document| (document.number, document.manifests.len())).collect();
        assert_eq!(counts, [(1, 1), (2, 0), (3, 1)]);
        assert_eq!(input.documents[0].line_of("", "metadata.name"), Some(5));
        for nothing in ["", "\n", "# only a comment\n"] {
            let input = read(nothing);
            assert!(
                input.troubles.is_empty() && input.documents.iter().all(|d| d.manifests.is_empty()),
                "{input:?}"
            );
        }
    }

    #[test]
    fn json_and_streams_of_it_are_read() {
        let input = read(
            "{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": []}\n{\"key\": \"\\ud83d\\udc18\"}",
        );
        assert_eq!((input.troubles.len(), input.documents.len()), (0, 2), "{:?}", input.troubles);
        let flow = read("{apiVersion: v1, kind: List}");
        assert_eq!((flow.troubles.len(), flow.documents.len()), (0, 1), "flow style is YAML");
    }

    #[test]
    fn merge_keys_and_anchors_are_followed() {
        let input = read("base: &base {replicas: 2}\nkind: X\napiVersion: v1\nspec: {<<: *base}\n");
        assert_eq!(input.documents[0].manifests[0].object["spec"]["replicas"], 2);
    }

    #[test]
    fn bad_text_is_named_by_document_and_line_and_what_came_before_it_is_kept() {
        let input = read(&format!("{SET}---\nspec: [\n"));
        assert_eq!(input.documents.len(), 1);
        let trouble = &input.troubles[0];
        assert_eq!((trouble.file.as_str(), trouble.document), ("db.yaml", Some(2)));
        assert!(trouble.line.is_some() && trouble.problem.contains("nothing after it"), "{trouble:?}");
        assert!(only_trouble("image: {{ .Values.image }}").problem.contains("helm template"));
        assert_eq!(only_trouble("a: 1\na: 2\n").document, Some(1), "a key twice");
        let mut input = Input::default();
        input.file("db.yaml", &b"\xff\xfe"[..]);
        assert_eq!(input.troubles[0].problem, "it is not UTF-8 text");
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n".to_owned()
            + &('b'..='j').fold((String::new(), 'a'), |(text, last), next| {
                (format!("{text}{next}: &{next} [*{last},*{last},*{last},*{last},*{last},*{last},*{last},*{last},*{last}]\n"), next)
            }).0;
        assert!(only_trouble(&bomb).problem.contains("repetition"), "{bomb}");
        let deep = "[".repeat(100_000);
        assert_eq!(only_trouble(&deep).document, Some(1));
    }

    #[test]
    fn a_field_of_the_wrong_type_is_named_with_its_line() {
        for (text, field, line) in [
            (format!("{SET}spec: {{replicas: \"2\"}}\n"), "spec.replicas", 4),
            (format!("{SET}spec:\n  replicas: 99999999999\n"), "spec.replicas", 5),
            (SET.replace("\"true\"", "true"), "metadata.labels.howdah.dev/protect", 3),
            (SET.replace("\"true\"", "yes"), "metadata.labels[howdah.dev/protect]", 3),
            (SET.replace("apps/v1", "apps/v1beta1"), "apiVersion", 1),
            (
                SET.replace("name: db", "annotations: {howdah.dev/failover: off}"),
                "metadata.annotations[howdah.dev/failover]",
                3,
            ),
            (
                format!(
                    "apiVersion: v1\nkind: List\nitems:\n- {}",
                    "{apiVersion: apps/v1, kind: StatefulSet, metadata: {labels: {howdah.dev/protect: 1}}}"
                ),
                "items[0].metadata.labels.howdah.dev/protect",
                4,
            ),
        ] {
            let trouble = only_trouble(&text);
            assert_eq!((trouble.field.as_str(), trouble.line), (field, Some(line)), "{text}: {trouble:?}");
        }
    }

    #[test]
    fn numbers_for_quantities_and_whatever_is_not_labelled_are_fine() {
        let resources = "{name: pg, resources: {limits: {cpu: 2, memory: 1.5Gi}, requests: {cpu: 0.5}}}";
        let spec = format!(
            "spec: {{template: {{spec: {{containers: [{resources}], volumes: [{{name: v, emptyDir: {{sizeLimit: 1000}}}}]}}}}}}\n"
        );
        assert_eq!(read(&format!("{SET}{spec}")).troubles, []);
        assert_eq!(read(&SET.replace("howdah.dev/protect", "app").replace("\"true\"", "yes")).troubles, []);
    }

    #[test]
    fn a_folder_is_walked_in_order_without_what_is_hidden_or_linked() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for name in ["b.yaml", "a/c.yml", "a/d.json", ".git/e.yaml", "notes.txt"] {
            write(name, "{}");
        }
        std::os::unix::fs::symlink(folder.path(), folder.path().join("a/loop")).unwrap();
        let input = Input::read(&[folder.path().to_owned()]);
        let root = format!("{}/", folder.path().display());
        let files: Vec<String> =
            input.documents.iter().map(|document| document.file.replace(&root, "")).collect();
        assert_eq!(files, ["a/c.yml", "a/d.json", "b.yaml"]);
        let absent = Input::read(&[folder.path().join("absent.yaml")]);
        assert!(absent.troubles[0].problem.starts_with("open it: "), "{:?}", absent.troubles);
    }

    #[test]
    fn a_file_that_is_too_long_is_refused() {
        let mut input = Input::default();
        input.file("long.yaml", std::io::repeat(b' '));
        assert!(input.troubles[0].problem.contains("longer than"), "{:?}", input.troubles);
    }
}
