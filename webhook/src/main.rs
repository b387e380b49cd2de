//! howdah webhook.
fn main() {}
