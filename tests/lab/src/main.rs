//! howdah lab.
fn main() {}
