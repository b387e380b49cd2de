//! howdah adapters.
