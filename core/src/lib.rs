//! howdah core.
