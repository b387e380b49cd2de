//! howdah cli.
fn main() {}
