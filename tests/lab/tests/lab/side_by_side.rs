//! Labs of different names do not disturb each other.

use howdah_lab::lab::Lab;

use crate::down::{assert_nothing_left, down};
use crate::lab_beside;

#[test]
fn taking_one_lab_down_leaves_the_other_working() {
    let left = Lab::open_or_up_without_ceph(lab_beside("left").name()).unwrap();
    let right = Lab::open_or_up_without_ceph(lab_beside("right").name()).unwrap();
    left.kubectl_ok(&["create", "namespace", "only-left"]).unwrap();
    let in_right = right.kubectl(&["get", "namespace", "only-left"]).unwrap();
    assert!(!in_right.status.success(), "both names lead to one cluster");

    down(&left);
    assert_nothing_left(&left);
    right.kubectl_ok(&["create", "configmap", "still-here"]).unwrap();
    down(&right);
    assert_nothing_left(&right);
}
