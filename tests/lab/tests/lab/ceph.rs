//! The lab's Ceph is healthy and serves RBD.

use std::time::Duration;

use howdah_lab::ceph::POOL;
use howdah_lab::lab::Lab;
use howdah_lab::process::wait_until;
use howdah_lab::testing::shared_name;

/// The manager reports placement groups some seconds after they are active.
const HEALTH_LIMIT: Duration = Duration::from_secs(180);

#[test]
fn ceph_is_healthy_and_an_image_keeps_what_is_written() {
    let lab = Lab::open_or_up(&shared_name(), 0).unwrap();
    let healthy = || lab.ceph(&["health"]).unwrap().trim() == "HEALTH_OK";
    assert!(wait_until(HEALTH_LIMIT, healthy), "{}", lab.ceph(&["health", "detail"]).unwrap());

    let image = format!("{POOL}/lab-test-{}", std::process::id());
    let source = tempfile::NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..1 << 20).map(|index: u32| (index % 251) as u8).collect();
    std::fs::write(source.path(), &content).unwrap();
    let copy = source.path().with_extension("copy");
    lab.rbd(&["import", "--no-progress", &source.path().to_string_lossy(), &image]).unwrap();
    lab.rbd(&["export", "--no-progress", &image, &copy.to_string_lossy()]).unwrap();
    let read = std::fs::read(&copy).unwrap();
    std::fs::remove_file(&copy).unwrap();
    lab.rbd(&["rm", "--no-progress", &image]).unwrap();
    assert!(read == content, "the image gave back other bytes");
}

#[test]
fn the_features_of_a_new_image_are_those_the_storage_class_asks_for() {
    let lab = Lab::open_or_up(&shared_name(), 0).unwrap();
    let image = format!("{POOL}/lab-features-{}", std::process::id());
    lab.rbd(&["create", "--size", "16M", &image]).unwrap();
    let info: serde_json::Value =
        serde_json::from_str(&lab.rbd(&["info", "--format", "json", &image]).unwrap()).unwrap();
    lab.rbd(&["rm", "--no-progress", &image]).unwrap();
    let wanted = ["layering", "exclusive-lock", "object-map", "fast-diff", "deep-flatten"];
    assert_eq!(info["features"], serde_json::json!(wanted));
}
