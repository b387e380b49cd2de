//! howdah webhook.
