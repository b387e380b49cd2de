//! The lab's own tests: what later tests stand on.

mod control_plane;
