//! howdah scheduler.
