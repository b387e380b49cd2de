//! howdah scheduler.
fn main() {}
