//! howdah lab.
