//! The lab: a real Kubernetes control plane, a real Ceph and virtual-machine nodes on one machine, inside a
//! network namespace and a directory of their own; and what the tests that run in it share.

pub mod args;
pub mod cache;
pub mod ceph;
pub mod control_plane;
pub mod database;
pub mod demo;
pub mod down;
pub mod files;
pub mod forward;
pub mod image;
pub mod install;
pub mod lab;
pub mod mapping;
pub mod mounts;
pub mod netns;
pub mod node;
pub mod pki;
pub mod postgres;
pub mod process;
pub mod progress;
pub mod repository;
pub mod requirements;
pub mod reviews;
pub mod stage;
pub mod status;
pub mod storage;
pub mod story;
pub mod testing;
pub mod up;
